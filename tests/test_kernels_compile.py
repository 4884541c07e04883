"""The Triton kernels compiled for GPUs that are not there: every variant that the launcher can ask for must fit its chip.

The launch itself is what is called; only Triton's driver is replaced, by one that names a chip, and every launch is a
warm-up, which compiles and does not run. `-s` shows the registers.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastkl.kernels import rows_triton
from fastkl.kernels.rows import Logits
from fastkl.kernels.rows_triton import launch_config


class Chip(NamedTuple):
    target: GPUTarget
    shared_memory: int  # bytes that one program may have


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Variant(NamedTuple):
    """What a launch may differ in and be compiled anew for."""

    name: str
    dtype: torch.dtype
    gradient: torch.dtype | None
    capped: bool
    capped_teacher: bool
    tokens: bool
    vocabulary: (
        int  # 151936 is a multiple of 16 and has vectorised loads, 50257 is odd; 1 is a case of its own to Triton
    )

    def __str__(self) -> str:
        flags = [f for f in ("capped", "capped_teacher", "tokens") if getattr(self, f)]
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.gradient)]
        return "-".join([self.name, *dtypes, *flags, str(self.vocabulary)])


def variants() -> Iterator[Variant]:
    both = (False, True)
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    dtypes = [(fp32, None), (bf16, None), (fp32, fp32), (bf16, bf16), (fp32, bf16), (fp32, fp16)]
    for (dtype, gradient), capped, vocabulary in itertools.product(dtypes, both, (151936, 50257, 1)):
        yield Variant("token_nll", dtype, gradient, capped, False, True, vocabulary)
        for capped_teacher, tokens in itertools.product(both, both):
            yield Variant("reverse_kl", dtype, gradient, capped, capped_teacher, tokens, vocabulary)


def representative(v: Variant) -> bool:
    """The ones compiled on every run, per kernel: one that is common, two that are heavy, and one that is neither."""
    teacher = v.name == "reverse_kl"
    if v.gradient == torch.bfloat16 and v.tokens and v.capped_teacher == (v.capped and teacher):
        return v.capped if v.vocabulary == 50257 else v.vocabulary == 151936 and v.dtype == torch.float32
    return v == Variant(v.name, torch.bfloat16, None, False, teacher, not teacher, 50257)


class Driver:
    """As much of Triton's driver as a compilation asks for."""

    def __init__(self, chip: str) -> None:
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.chip].target

    def get_current_device(self) -> str:
        return f"{self.chip} for tests"  # the key of the cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


Launch = Callable[[str, Variant], Any]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launch]:
    """(chip, variant) -> the compiled kernel that the launcher would run."""
    compiled: list[Any] = []
    original = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(original(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(rows_triton, "_check_chunk", lambda chunk, dtypes: None)  # it refuses tensors on a CPU

    def run(chip: str, variant: Variant, n: int = 2, offset: int = 0) -> Any:
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(chip))
        chunk = torch.zeros(n, variant.vocabulary, dtype=variant.dtype)
        cap, cap_t = (0.5 + n if c else None for c in (variant.capped, variant.capped_teacher))
        two = variant.name == "reverse_kl"
        tokens = torch.zeros(n + offset, dtype=torch.int64)[offset:] if variant.tokens else None
        out = torch.zeros(2, n + offset)[:, offset:]
        logits = Logits(chunk, cap, chunk if two else None, cap_t if two else None)
        into = variant.gradient and (chunk if variant.gradient == variant.dtype else chunk.to(variant.gradient))
        getattr(rows_triton, variant.name)(logits, tokens, out, into)
        return compiled.pop()

    yield run
    for kernel in (rows_triton._token_nll_kernel, rows_triton._reverse_kl_kernel):
        kernel.device_caches.clear()


def assert_fits(kernel: Any, chip: str, tmp_path: Path) -> str:
    """No spills, no stack, shared memory within the chip's, room for two programs; returns a line about registers."""
    assert kernel.metadata.shared <= CHIPS[chip].shared_memory
    if CHIPS[chip].target.backend == "hip":
        text = kernel.asm["amdgcn"]
        usage = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)\n", text)}
        assert usage["private_segment_fixed_size"] == usage["vgpr_spill_count"] == usage["sgpr_spill_count"] == 0, usage
        return f"{usage['vgpr_count']} vector and {usage['sgpr_count']} scalar registers"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report)}
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0), report
    threads = 32 * kernel.metadata.num_warps
    assert 2 * usage["REG"] * threads <= 65536, f"two programs must fit a multiprocessor: {report}"
    return f"{usage['REG']} registers"


@pytest.mark.parametrize("variant", [v for v in variants() if representative(v)], ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_variant_fits(launch: Launch, chip: str, variant: Variant, tmp_path: Path) -> None:
    print(f"\n{chip} {variant}: {assert_fits(launch(chip, variant), chip, tmp_path)}")


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_variant_fits(launch: Launch, chip: str, tmp_path: Path) -> None:
    for variant in variants():
        print(f"\n{chip} {variant}: {assert_fits(launch(chip, variant), chip, tmp_path)}")


@pytest.mark.parametrize("name", ["token_nll", "reverse_kl"])
def test_rows_move_in_vectors(launch: Launch, name: str) -> None:
    """16 bytes per thread and access wherever the width allows."""
    variant = Variant(name, torch.float32, torch.float32, False, False, True, 151936)
    ptx = launch("sm_90", variant).asm["ptx"]
    chunks = 1 if name == "token_nll" else 2
    config = launch_config(chunks)
    vectors = config.block // (32 * config.num_warps) // 4  # per chunk and pass
    assert len(re.findall(r"ld\.global[.\w:]*\.v4", ptx)) == 2 * vectors * chunks
    assert len(re.findall(r"st\.global[.\w:]*\.v4", ptx)) == vectors


@pytest.mark.parametrize("name", ["token_nll", "reverse_kl"])
def test_nothing_is_compiled_again_for_another_chunk(launch: Any, name: str) -> None:
    """Another number of rows, another place of the chunk in its call, another cap: the same kernel."""
    variant = Variant(name, torch.float32, None, True, False, True, 32000)
    first = launch("sm_90", variant)
    for n, offset in ((1, 0), (16, 0), (17, 1), (3, 5), (32, 16)):
        assert launch("sm_90", variant, n, offset) is first
    assert launch("sm_90", variant._replace(vocabulary=50256)) is first
    assert launch("sm_90", variant._replace(vocabulary=50257)) is not first
