"""The scoring kernels compiled for GPUs that are not there: every variant must fit its chip and use its tensor cores.

As in test_kernels_compile.py the launch itself is what is called, with a driver that names a chip, and every launch is a
warm-up, which compiles and does not run. `-s` shows what each takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from aot import CHIPS, Driver, usage
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastkl.kernels import score_triton
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.score_triton import Head

KERNELS = (
    score_triton._token_nll_kernel,
    score_triton._merge_token_nll_kernel,
    score_triton._reverse_kl_kernel,
    score_triton._merge_reverse_kl_kernel,
)


class Variant(NamedTuple):
    """What a launch may differ in and be compiled anew for."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    dim: int = 512  # 512: steps of D come out even; 528: they do not; 520: no vectors, but descriptors; 513: neither
    entropy: bool = False
    capped: bool = False
    capped_teacher: bool = False
    bias: bool = False
    tokens: bool = True
    vocabulary: int = 4096

    def __str__(self) -> str:
        flags = [f for f in ("entropy", "capped", "capped_teacher", "bias", "tokens") if getattr(self, f)]
        return "-".join(
            [self.name, str(self.dtype).removeprefix("torch."), *flags, str(self.dim), str(self.vocabulary)]
        )


def variants() -> Iterator[Variant]:
    both = (False, True)
    operands = [*itertools.product([torch.bfloat16], [512, 528, 513]), *itertools.product([torch.float32], [512, 513])]
    operands += [(torch.float16, 520)]
    for (dtype, dim), capped, bias in itertools.product(operands, both, both):
        for entropy in both:
            yield Variant("token_nll", dtype, dim, entropy, capped, bias=bias)
        for capped_teacher in both:
            yield Variant("reverse_kl", dtype, dim, False, capped, capped_teacher, bias)
    yield Variant("reverse_kl", tokens=False, vocabulary=4097)
    yield Variant("token_nll", vocabulary=4097)


REPRESENTATIVE = [
    Variant("token_nll"),
    Variant("token_nll", torch.float16, 528, entropy=True, bias=True),
    Variant("reverse_kl"),
]
Launch = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels, shared by the tests."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Launch]:
    """(chip, variant) -> the compiled kernels that the launcher would run: the product, then the merge."""
    compiled: list[Any] = []
    original = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(original(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(score_triton, "_check_head", lambda head: None)  # it refuses tensors on a CPU

    def run(chip: str, v: Variant, n: int = 2, offset: int = 0) -> list[Any]:
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(chip))
        compiled.clear()

        def head(capped: bool) -> Head:
            hidden, weight = torch.empty(n, v.dim, dtype=v.dtype), torch.empty(v.vocabulary, v.dim, dtype=v.dtype)
            bias: Tensor | None = torch.empty(v.vocabulary, dtype=v.dtype) if v.bias else None
            return Head(hidden, weight, bias, HeadOptions(temperature=0.5 + n, softcap=0.5 + n if capped else None))

        tokens = torch.zeros(n + offset, dtype=torch.int64)[offset:]
        out = torch.empty(2, n + offset)[:, offset:]
        if v.name == "token_nll":
            score_triton.token_nll(head(v.capped), tokens, out, v.entropy)
        else:
            score_triton.reverse_kl(head(v.capped), head(v.capped_teacher), tokens if v.tokens else None, out)
        return list(compiled)

    yield run
    for kernel in KERNELS:
        kernel.device_caches.clear()


def assert_fits(kernels: list[Any], chip: str, variant: Variant, folder: Path) -> None:
    """No spills, shared memory within the chip's, and matrix instructions."""
    for kernel in kernels:
        taken = usage(kernel, chip, folder)
        print(f"\n{chip} {variant} {kernel.name}: {taken}", end="")
        assert taken.spilled == 0
        # The rule for sm_80 is for its smaller relatives as well.
        assert taken.shared_memory <= (99 * 1024 if chip == "sm_80" else CHIPS[chip].shared_memory)
    code = kernels[0].asm["amdgcn" if chip == "gfx942" else "ptx"]
    assert matrix_instruction(chip, variant) in code
    assert "tf32" not in code
    assert "xf32" not in code


def matrix_instruction(chip: str, variant: Variant) -> str:
    if variant.dtype == torch.float32:  # float32 throughout: no tensor cores on NVIDIA's, which would round to tf32
        return "v_mfma_f32" if chip == "gfx942" else "fma.rn.f32"
    return {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma_f32"}[chip]


@pytest.mark.parametrize("variant", REPRESENTATIVE, ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_variant_fits(launch: Launch, chip: str, variant: Variant, tmp_path: Path) -> None:
    assert_fits(launch(chip, variant), chip, variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_variant_fits(launch: Launch, chip: str, tmp_path: Path) -> None:
    for variant in variants():
        assert_fits(launch(chip, variant), chip, variant, tmp_path)


def test_operands_travel_by_descriptor(launch: Launch) -> None:
    for dim, by_descriptor in ((512, True), (520, True), (513, False)):
        ptx = launch("sm_90", Variant("token_nll", dim=dim))[0].asm["ptx"]
        assert ("cp.async.bulk.tensor" in ptx) == by_descriptor
    assert "cp.async.cg" in launch("sm_80", Variant("token_nll"))[0].asm["ptx"]


def test_tiles_share_one_pipeline(launch: Launch) -> None:
    """The loop over tiles is flattened: the steps of D that fill the pipeline are issued once, before the loop."""
    ptx = launch("sm_90", Variant("token_nll"))[0].asm["ptx"]
    assert ptx.count("wgmma.mma_async") == 4  # a step of 64 in products of 16
    assert ptx.count("cp.async.bulk.tensor") == 2 * 4  # two operands; 3 steps ahead, and the loop's own


@pytest.mark.parametrize("variant", [REPRESENTATIVE[0], REPRESENTATIVE[2]], ids=str)
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_nothing_is_compiled_again_for_another_batch(launch: Launch, chip: str, variant: Variant) -> None:
    """Another number of rows, another place of the tokens and values in theirs, another temperature: the same kernels."""
    first = launch(chip, variant)
    for n, offset in ((1, 0), (16, 0), (17, 1), (3, 5), (4096, 16)):
        assert all(again is kernel for again, kernel in zip(launch(chip, variant, n, offset), first, strict=True))
