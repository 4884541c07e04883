"""The tests of the Triton kernels in Triton's interpreter, in a process of their own: it is chosen when Triton is imported.

On a machine with a GPU the same files run on the device. What the interpreter cannot do is in test_ahead_of_time.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from devices import INTERPRETED

from fastkl.kernels.divergence.triton import divergence
from fastkl.kernels.epilogue import triton as epilogue_triton
from fastkl.kernels.options import CrossEntropy, Sparse
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.rows import triton as rows_triton
from fastkl.kernels.rows.cross_entropy import triton as cross_entropy_triton
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.score import triton as score_triton
from fastkl.kernels.score.triton import Head
from fastkl.kernels.sparse import steps as sparse_steps
from fastkl.kernels.sparse import triton as sparse_triton
from fastkl.kernels.top_k import triton as top_k_triton

TESTS = Path(__file__).parents[1]
slow = pytest.mark.slow

# Files that share a process, which imports torch for seconds. How many of a file's tests run there, at the least.
RUNS: list[dict[str, int]] = [
    {"kernels/divergence/test_triton.py": 260},
    {"loss/test_triton.py": 70, "loss/operands/test_pieces_triton.py": 20, "check/test_check_triton.py": 12},
    {"kernels/sparse/test_triton.py": 45, "kernels/top_k/test_triton.py": 60},
    {"kernels/score/test_triton.py": 150, "kernels/epilogue/test_triton.py": 110},
    {"kernels/rows/test_triton.py": 100, "kernels/rows/cross_entropy/test_triton.py": 75},
]
SLOW_RUNS: list[tuple[dict[str, int], str]] = [
    ({"kernels/epilogue/test_triton.py": 1}, "slow"),
    ({"kernels/score/test_triton.py": 2}, "slow"),
    ({"kernels/divergence/test_triton.py": 120}, "slow"),
    ({"integrations/test_liger_cross_entropy.py": 15}, "not slow"),
]


@pytest.mark.parametrize(
    ("at_least", "marker"),
    [*[(run, "not slow") for run in RUNS], *[pytest.param(*run, marks=slow) for run in SLOW_RUNS]],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_in_the_interpreter(at_least: dict[str, int], marker: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--verbose", "-p", "no:cacheprovider"),
            *("-W", "ignore::RuntimeWarning", "-m", marker, *(str(TESTS / file) for file in at_least)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = Counter(re.findall(r"^tests/(\S+?)::.* PASSED", done.stdout, re.MULTILINE))
    for file, count in at_least.items():
        assert passed[file] >= count, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout


def test_every_file_is_run() -> None:
    files = {file for run in RUNS for file in run}
    assert files >= {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*triton.py")}


CHUNK, TOKENS, OUT = Logits(torch.zeros(2, 8)), torch.zeros(2, dtype=torch.int64), torch.zeros(5, 2)
PAIR = CHUNK._replace(teacher=torch.zeros(2, 8))
HEAD = Head(torch.zeros(2, 8), torch.zeros(5, 8), None, HeadOptions())
LAUNCHES: dict[str, Callable[[], object]] = {
    "token_nll": lambda: rows_triton.token_nll(CHUNK, TOKENS, OUT, None),
    "token_nll_entropy": lambda: rows_triton.token_nll_entropy(CHUNK, TOKENS, OUT, None),
    "entropy_gradient": lambda: rows_triton.entropy_gradient(CHUNK, TOKENS, OUT, OUT[:3], CHUNK.student),
    "cross_entropy": lambda: cross_entropy_triton.cross_entropy(CrossEntropy(), CHUNK, TOKENS, OUT, None),
    "clear_rows": lambda: rows_triton.clear_rows(CHUNK.student, OUT[0]),
    "tail_sums": lambda: top_k_triton.tail_sums(CHUNK, OUT),
    "tail_gradient": lambda: top_k_triton.tail_gradient(CHUNK, OUT[0], OUT[1], CHUNK.student),
    "divergence": lambda: divergence("jsd", 0.5, PAIR, None, OUT[:2], None),
    "score.token_nll": lambda: score_triton.token_nll(HEAD, TOKENS, OUT),
    "score.reverse_kl": lambda: score_triton.reverse_kl(HEAD, HEAD, TOKENS, OUT),
    "epilogue.token_nll": lambda: epilogue_triton.token_nll(HEAD, TOKENS, OUT[0], OUT, CHUNK.student),
    "sparse.TritonColumnSampler": lambda: sparse_triton.TritonColumnSampler(Sparse(0, error=0.1), HEAD.weight, False),
    "sparse.column_squares": lambda: sparse_steps.column_squares(CHUNK.student, OUT[0]),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on a CPU")
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_tensors_on_a_cpu_are_refused(launch: Callable[[], object]) -> None:
    wrong = r"need a CUDA or HIP device and the (chunk is|hidden states are|weight is) on cpu: pass backend=\"torch\""
    with pytest.raises(ValueError, match=wrong):
        launch()
