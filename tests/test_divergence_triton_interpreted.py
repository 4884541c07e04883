"""test_divergence_triton.py in Triton's interpreter, in a process of its own: it is chosen when Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkl.kernels.divergence_triton import divergence
from fastkl.kernels.rows import Logits

TESTS = Path(__file__).parent / "test_divergence_triton.py"


def run_tests(marker: str, at_least: int) -> None:
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", marker, str(TESTS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TESTS.parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > at_least, done.stdout
    assert "skipped" not in done.stdout, done.stdout


def test_divergences_in_the_interpreter() -> None:
    run_tests("not slow", at_least=150)


@pytest.mark.slow
def test_more_divergences_in_the_interpreter() -> None:
    run_tests("slow", at_least=50)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on a CPU")
def test_tensors_on_a_cpu_are_refused() -> None:
    chunk = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"CUDA or HIP device and the chunk is on cpu: pass backend=\"torch\""):
        divergence("jsd", 0.5, Logits(chunk, None, chunk, None), None, torch.zeros(2, 2), None)
