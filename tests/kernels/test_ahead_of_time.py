"""The Triton kernels compiled for GPUs that are not there: every variant that the launchers can ask for must fit its chip.

`-s` shows the registers, and `python -m bench kernels` all of it as a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.variants import VARIANTS, Variant, rows
from bench.variants import divergence as divergences
from bench.variants import score as scores
from bench.variants import sparse as samples
from bench.variants.aot import CHIPS, compiler, resources
from bench.variants.divergence import DivergenceVariant, divergence_variants
from bench.variants.rows import RowVariant, row_variants
from bench.variants.score import ScoreVariant, score_variants
from bench.variants.sparse import SparseVariant, sparse_variants
from fastkl.kernels.divergence.formula import Divergence
from fastkl.kernels.rows.launch import launch_config

Launch = Callable[..., list[Any]]
FP32, BF16 = torch.float32, torch.bfloat16
REGISTERS = 65536  # of a multiprocessor
SAMPLE = 13  # of the divergences one variant in so many, others on each chip: minutes, not hours
chips = pytest.mark.parametrize("chip", CHIPS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels, shared by the tests."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Launch]:
    """(chip, variant) -> the compiled kernels that the launcher would run: one; of scoring the product, then the merge."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    with compiler() as compile_launch:

        def run(chip: str, variant: Variant, n: int = 2, offset: int = 0) -> list[Any]:
            compiled = compile_launch(chip, lambda: variant.launch(n, offset))
            assert compiled[0].name == variant.kernel
            return [kernel for _, kernel in compiled]

        yield run


def assert_fits(kernels: list[Any], chip: str, variant: Variant) -> None:
    """No spills, no stack, shared memory within the chip's, room for as many programs as the variant is to have."""
    for kernel in kernels:
        used = resources(kernel)
        print(f"\n{chip} {variant.kernel} {variant.config}: {used.registers} registers", end="")
        assert used.spill_bytes == 0
        assert used.shared_bytes <= CHIPS[chip].shared_memory
        if CHIPS[chip].target.backend == "cuda":
            threads = 32 * kernel.metadata.num_warps
            assert variant.programs * used.registers * threads <= REGISTERS, used
    if isinstance(variant, ScoreVariant) or (isinstance(variant, SparseVariant) and variant.multiplies):
        assert_multiplies(kernels[0], chip, variant)


def assert_multiplies(kernel: Any, chip: str, variant: ScoreVariant | SparseVariant) -> None:
    """By the chip's matrix instructions; float32 as such, which on NVIDIA's chips is without tensor cores."""
    code = kernel.asm["amdgcn" if chip == "gfx942" else "ptx"]
    families = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    exact = variant.dtype == FP32 and chip != "gfx942"
    assert resources(kernel).tensor_core == (None if exact else families[chip])
    assert ("fma.rn.f32" if exact else {"gfx942": "v_mfma_f32"}.get(chip, "")) in code
    assert "tf32" not in code
    assert "xf32" not in code


@chips
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.representative], ids=lambda v: f"{v.kernel}-{v.config}")
def test_variant_fits(launch: Launch, chip: str, variant: Variant) -> None:
    assert_fits(launch(chip, variant), chip, variant)


@pytest.mark.slow
@chips
def test_every_variant_fits(launch: Launch, chip: str) -> None:
    for variant in (*row_variants(), *score_variants(), *sparse_variants()):
        assert_fits(launch(chip, variant), chip, variant)


@pytest.mark.slow
@chips
def test_many_divergences_fit(launch: Launch, chip: str) -> None:
    for variant in list(divergence_variants())[list(CHIPS).index(chip) :: SAMPLE]:
        assert_fits(launch(chip, variant), chip, variant)


def test_representatives_are_variants() -> None:
    for family in (rows, divergences, scores, samples):
        assert set(family.REPRESENTATIVE) <= set(VARIANTS)
    assert {v.kernel for v in VARIANTS if v.representative} == {v.kernel for v in VARIANTS}


def row_variant(kernel: str, gradient: bool) -> RowVariant:
    return RowVariant(kernel, FP32, FP32 if gradient else None, False, 151936)


def divergence_variant(kind: Divergence) -> DivergenceVariant:
    return DivergenceVariant(kind, FP32, FP32, False, False, True, False, 151936)


# Walks over the chunks, of which there are one or two; whether a gradient is written.
WALKS: list[tuple[Variant, int, int, bool]] = [
    (row_variant("rows.token_nll", gradient=True), 2, 1, True),
    (row_variant("rows.token_nll_entropy", gradient=False), 1, 1, False),
    (row_variant("rows.entropy_gradient", gradient=True), 1, 1, True),
    (row_variant("tails.tail_sums", gradient=False), 1, 1, False),
    (row_variant("tails.tail_gradient", gradient=True), 1, 1, True),
    (divergence_variant("forward_kl"), 2, 2, True),
    (divergence_variant("total_variation"), 3, 2, True),
]


@pytest.mark.parametrize(("variant", "walks", "chunks", "writes"), WALKS, ids=lambda v: getattr(v, "kernel", None))
def test_rows_move_in_vectors(launch: Launch, variant: Variant, walks: int, chunks: int, writes: bool) -> None:
    """16 bytes per thread and access wherever the width allows; a walk reads each chunk once, the last one writes."""
    ptx = launch("sm_90", variant)[0].asm["ptx"]
    config = launch_config(chunks)
    vectors = config.block // (32 * config.num_warps) // 4  # per chunk and walk
    assert len(re.findall(r"ld\.global[.\w:]*\.v4", ptx)) == walks * vectors * chunks
    assert len(re.findall(r"st\.global[.\w:]*\.v4", ptx)) == vectors * writes


ANOTHER_CALL = [(1, 0), (16, 0), (17, 1), (3, 5), (32, 16)]  # rows, and where results and tokens stand in their buffers
ROWS = [
    RowVariant("rows.token_nll", FP32, None, True, 32000),
    RowVariant("rows.token_nll_entropy", FP32, None, True, 32000),
    RowVariant("rows.entropy_gradient", FP32, FP32, True, 32000),
    RowVariant("tails.tail_sums", FP32, None, True, 32000),
    RowVariant("tails.tail_gradient", FP32, FP32, True, 32000),
    DivergenceVariant("jsd", FP32, None, True, False, True, True, 32000),
]


@pytest.mark.parametrize("variant", ROWS, ids=lambda v: v.kernel)
def test_nothing_is_compiled_again_for_another_chunk(launch: Launch, variant: RowVariant | DivergenceVariant) -> None:
    """Another number of rows, another place of the chunk in its call, another cap or parameter: the same kernel."""
    first = launch("sm_90", variant)
    for n, offset in ANOTHER_CALL:
        assert launch("sm_90", variant, n, offset) == first
    assert launch("sm_90", variant._replace(vocabulary=50256)) == first
    assert launch("sm_90", variant._replace(vocabulary=50257)) != first


@pytest.mark.parametrize("name", ["token_nll", "reverse_kl"])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_nothing_is_compiled_again_for_another_batch(launch: Launch, chip: str, name: str) -> None:
    """Another number of rows, another place of the tokens and values in theirs, another temperature: the same kernels."""
    first = launch(chip, ScoreVariant(name))
    for n, offset in (*ANOTHER_CALL, (4096, 16)):
        assert launch(chip, ScoreVariant(name), n, offset) == first


def test_equals_cannot_differ_by_a_fused_multiplication(launch: Launch) -> None:
    """p − q with the product of either one fused into it would not be 0 where p = q."""
    (kernel,) = launch("sm_90", divergence_variant("forward_kl"))
    assert not kernel.metadata.enable_fp_fusion
    gradient = kernel.asm["ptx"].rpartition("ld.global")[2]  # what comes after the last load
    assert "fma" not in gradient


def test_operands_travel_by_descriptor(launch: Launch) -> None:
    for dim, by_descriptor in ((512, True), (520, True), (513, False)):
        ptx = launch("sm_90", ScoreVariant("token_nll", dim=dim))[0].asm["ptx"]
        assert ("cp.async.bulk.tensor" in ptx) == by_descriptor
    assert "cp.async.cg" in launch("sm_80", ScoreVariant("token_nll"))[0].asm["ptx"]


def test_tiles_share_one_pipeline(launch: Launch) -> None:
    """The loop over tiles is flattened: the steps of D that fill the pipeline are issued once, before the loop."""
    ptx = launch("sm_90", ScoreVariant("token_nll"))[0].asm["ptx"]
    assert ptx.count("wgmma.mma_async") == 4  # a step of 64 in products of 16
    assert ptx.count("cp.async.bulk.tensor") == 2 * 4  # two operands; 3 steps ahead, and the loop's own


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
def test_compaction_loads_before_it_stores(launch: Launch, capped: bool) -> None:
    """On a chip whose barriers do not wait for loads: all have arrived before a barrier, and the one store follows one."""
    assembly = launch("gfx942", SparseVariant("sparse.compact", capped=capped))[0].asm["amdgcn"]
    store = assembly.index("buffer_store")
    assert assembly.count("buffer_store") == 1
    block = assembly[assembly.rindex(".LBB0_", 0, store) : store]
    assert "s_barrier" in block
    assert "buffer_load" not in block
    after_loads = assembly.rpartition("buffer_load")[2]
    assert re.search(r"vmcnt\(0\).*?s_barrier", after_loads, re.DOTALL)
