"""test_score_triton.py in Triton's interpreter, in a process of its own: TRITON_INTERPRET counts at its import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkl.kernels import score_triton
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.score_triton import Head

TESTS = Path(__file__).parent / "test_score_triton.py"


def run_interpreted(*options: str) -> None:
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options, str(TESTS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TESTS.parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


def test_scoring_in_the_interpreter() -> None:
    run_interpreted()


@pytest.mark.slow
def test_slow_scoring_in_the_interpreter() -> None:
    run_interpreted("-m", "slow")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on a CPU")
def test_tensors_on_a_cpu_are_refused() -> None:
    head = Head(torch.zeros(2, 8), torch.zeros(5, 8), None, HeadOptions())
    tokens, out = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"need a CUDA or HIP device; the hidden states are on cpu"):
        score_triton.token_nll(head, tokens, out)
    with pytest.raises(ValueError, match=r"need a CUDA or HIP device; the hidden states are on cpu"):
        score_triton.reverse_kl(head, head, tokens, out)
