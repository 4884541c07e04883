"""test_rows_triton.py in Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkl.kernels import rows_triton
from fastkl.kernels.rows import Logits

TESTS = Path(__file__).parent / "test_rows_triton.py"


def test_row_functions_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--quiet",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        str(TESTS),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parents[1], check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 100, done.stdout
    assert "skipped" not in done.stdout, done.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on a CPU")
def test_tensors_on_a_cpu_are_refused() -> None:
    chunk, tokens, out = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2)
    for name in ("token_nll", "reverse_kl"):
        with pytest.raises(ValueError, match=r"CUDA or HIP device and the chunk is on cpu: pass .*rows_torch"):
            getattr(rows_triton, name)(Logits(chunk, None, chunk, None), tokens, out, None)
