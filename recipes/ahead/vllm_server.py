"""A vLLM server on a CPU for `measure.py vllm`. It has one core, and the run that asks it another."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "support" / "servers"))
from real_vllm import serving_vllm

STUDENT = Path("runs/smollm2/student")


@contextmanager
def serving_alone(python: str, folder: Path) -> Iterator[str]:
    """The address of a server that `python` runs on a core of its own; meanwhile this process takes another."""
    before = os.sched_getaffinity(0)
    theirs, ours = sorted(before)[:2]
    pinned = ["taskset", "-c", str(theirs), python]
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(theirs)}
    with serving_vllm(pinned, STUDENT, "student", folder, environment=threads) as url:
        os.sched_setaffinity(0, {ours})
        try:
            yield url
        finally:
            os.sched_setaffinity(0, before)
