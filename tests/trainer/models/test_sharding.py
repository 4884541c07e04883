"""What FSDP gathers for the batches of a step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from fused_training import gathered_bytes
from groups import in_group


@pytest.mark.parametrize("kind", ["full", pytest.param("lora-of-fused", marks=pytest.mark.slow)])
def test_the_head_is_gathered_once_for_all_batches(kind: str) -> None:
    """3 batches with a backward pass each and 2 without would gather what is in no layer 8 times; twice is enough."""
    for each_time, once in in_group(gathered_bytes, kind):
        saved = each_time.gathered - once.gathered
        assert saved == pytest.approx(6 * once.outer, rel=0.02)
        assert each_time.gradients.keys() == once.gradients.keys()
        for name, gradient in once.gradients.items():
            assert torch.equal(gradient, each_time.gradients[name]), name


# Large blocks between small ones that stay, after a freed block has raised glibc's limit to 16 MiB.
HOLES = """
import ctypes, sys
from pathlib import Path
from fastkl.trainer.models.sharding import give_back_large_blocks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def block(size):
    start = allocate(size)
    ctypes.memset(start, 1, size)
    return start

libc = ctypes.CDLL(None)
allocate, free = libc.malloc, libc.free
allocate.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
free(block(16 << 20))
if sys.argv[1] == "given back":
    give_back_large_blocks()
large = []
for _ in range(50):
    large.append(block(2 << 20))
    block(64 << 10)
before = resident()
for start in large:
    free(start)
print((before - resident()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="of glibc")
@pytest.mark.parametrize(
    ("call", "limit", "freed"),
    [("given back", None, True), ("kept", None, False), ("given back", str(32 << 20), False)],
)
def test_what_is_freed_between_blocks_that_stay_is_given_back(call: str, limit: str | None, freed: bool) -> None:
    """Of 100 MiB; what the environment says of the limit stays."""
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_THRESHOLD_"}
    if limit is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = limit
    line = [sys.executable, "-c", HOLES, call]
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert (int(ran.stdout) > 90) == freed
