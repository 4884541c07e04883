"""The Triton kernels compiled for GPUs that are not there: every variant that the launchers can ask for must fit its chip.

`-s` shows the registers, and `python -m bench kernels` all of it as a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.variants import LAUNCHERS, VARIANTS
from bench.variants.aot import CHIPS, compiler, resources
from bench.variants.launcher import BF16, CUT, FP32, Variant
from fastkl.kernels.divergence.formula import DIVERGENCES
from fastkl.kernels.rows.launch import row_config

Launch = Callable[..., list[Any]]
REGISTERS = 65536  # of a multiprocessor
SAMPLE = 13  # of the divergences one variant in so many, others on each chip: minutes, not hours
chips = pytest.mark.parametrize("chip", CHIPS)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, compiled: Path) -> Iterator[Launch]:
    """(chip, variant) -> the compiled kernels that the launcher would run: one; of scoring the product, then the merge."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled))
    with compiler() as compile_launch:

        def run(chip: str, variant: Variant, n: int = 2, offset: int = 0) -> list[Any]:
            launched = compile_launch(chip, lambda: variant.launch(n, offset))
            assert launched[0].name == variant.kernel
            return [kernel for _, kernel in launched]

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
            assert variant.launcher.programs * used.registers * threads <= REGISTERS, used
    if variant.launcher.multiplies:
        assert_multiplies(kernels[0], chip, variant)


def assert_multiplies(kernel: Any, chip: str, variant: Variant) -> None:
    """By the chip's matrix instructions; float32 as such, which on NVIDIA's chips is without tensor cores."""
    code = kernel.asm["amdgcn" if chip == "gfx942" else "ptx"]
    families = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    exact = "float32" in variant.config and chip != "gfx942"
    assert resources(kernel).tensor_core == (None if exact else families[chip])
    assert ("fma.rn.f32" if exact else {"gfx942": "v_mfma_f32"}.get(chip, "")) in code
    assert "tf32" not in code
    assert "xf32" not in code


def stood_for(chip: str, variant: Variant) -> bool:
    """By the last of its launcher's, which has the most options: walks over rows are much alike on NVIDIA's chips.

    Of products that holds for the chip whose operands have no descriptors.
    """
    walks = not variant.launcher.multiplies and not variant.kernel.startswith("epilogue.")
    alike = ("sm_80", "sm_100") if walks else ("sm_80",)
    return chip in alike and variant.options != variant.launcher.representative[-1]


REPRESENTATIVES = [
    pytest.param(
        *(chip, variant),
        marks=pytest.mark.slow if stood_for(chip, variant) else (),
        id=f"{variant.kernel}-{variant.config}-{chip}",
    )
    for launcher in LAUNCHERS
    for variant in (Variant(launcher, options) for options in launcher.representative)
    for chip in CHIPS
]


@pytest.mark.parametrize(("chip", "variant"), REPRESENTATIVES)
def test_variant_fits(launch: Launch, chip: str, variant: Variant) -> None:
    assert_fits(launch(chip, variant), chip, variant)


@pytest.mark.slow
@chips
def test_every_variant_fits(launch: Launch, chip: str) -> None:
    for variant in VARIANTS:
        if variant.kernel != "divergence.divergence":
            assert_fits(launch(chip, variant), chip, variant)


@pytest.mark.slow
@chips
def test_many_divergences_fit(launch: Launch, chip: str) -> None:
    variants = [variant for variant in VARIANTS if variant.kernel == "divergence.divergence"]
    for variant in variants[list(CHIPS).index(chip) :: SAMPLE]:
        assert_fits(launch(chip, variant), chip, variant)


def test_representatives_are_variants() -> None:
    for launcher in LAUNCHERS:
        assert launcher.representative
        assert all(options in launcher.variants for options in launcher.representative)


def like(kernel: str, **options: object) -> Variant:
    """The first representative of a kernel, but for some options."""
    launcher = next(launcher for launcher in LAUNCHERS if launcher.kernel == kernel)
    return Variant(launcher, {**launcher.representative[0], **options})


def plain(kernel: str, gradient: bool, **options: object) -> Variant:
    """On chunks of float32 without soft-caps, in vectors."""
    return like(kernel, dtypes=(FP32, FP32 if gradient else None), capped=False, vocabulary=151936, **options)


# Walks over the chunks, of which there are one or two; whether a gradient is written.
WALKS: list[tuple[Variant, int, int, bool]] = [
    (plain("rows.token_nll", gradient=True), 4, 1, True),  # the first block, the sums, those again where it must, u
    (like("rows.token_nll"), 3, 1, True),  # u in bf16, with the sums
    (plain("rows.token_nll_entropy", gradient=False), 1, 1, False),
    (plain("rows.entropy_gradient", gradient=True), 1, 1, True),
    (plain("cross_entropy.cross_entropy", gradient=True), 2, 1, True),
    (like("rows.token_nll", bias=True), 6, 1, True),
    (plain("rows.entropy_gradient", gradient=True, bias=True), 2, 1, True),
    (plain("cross_entropy.cross_entropy", gradient=True, bias=True), 4, 1, True),
    (plain("top_k.tail_gradient", gradient=True, bias=True), 2, 1, True),
    (plain("divergence.divergence", gradient=True, kind="forward_kl", bias=True, teacher_bias=True), 4, 2, True),
    (plain("top_k.tail_sums", gradient=False), 1, 1, False),
    (plain("top_k.tail_gradient", gradient=True), 1, 1, True),
    (plain("divergence.divergence", gradient=True, kind="forward_kl"), 2, 2, True),
    (plain("divergence.divergence", gradient=True, kind="total_variation"), 3, 2, True),
]


@pytest.mark.parametrize(("variant", "walks", "chunks", "writes"), WALKS, ids=lambda v: getattr(v, "kernel", None))
def test_rows_move_in_vectors(launch: Launch, variant: Variant, walks: int, chunks: int, writes: bool) -> None:
    """16 bytes per thread and access wherever the width allows; a walk reads each chunk once, the last one writes.

    A bias of [V] is read as often as its chunk.
    """
    ptx = launch("sm_90", variant)[0].asm["ptx"]
    config = row_config(chunks)
    vectors = config.block_n // (32 * config.num_warps) // 4  # per chunk and walk
    assert len(re.findall(r"ld\.global[.\w:]*\.v4", ptx)) == walks * vectors * chunks
    assert len(re.findall(r"st\.global[.\w:]*\.v4", ptx)) == vectors * writes


VECTORS = [  # the kernels that walk over rows: read, written
    (like("rows.token_nll"), 16, 16),
    (like("rows.token_nll_entropy"), 16, 4),
    (like("rows.entropy_gradient"), 16, 16),
    (like("rows.clear_rows"), 4, 16),
    (like("cross_entropy.cross_entropy"), 16, 16),
    (like("top_k.tail_sums"), 16, 4),
    (like("top_k.tail_gradient"), 16, 16),
    *[(like("divergence.divergence", kind=kind), 16, 8) for kind in DIVERGENCES],
    (like("sparse.column_squares"), 16, 4),
    (like("sparse.compact"), 16, 16),
    (like("sparse.hidden_gradient"), 4, 16),  # operands come by cp.async
    (like("sparse.weight_gradient"), 16, 16),
]


@pytest.mark.parametrize(("variant", "loads", "stores"), VECTORS, ids=lambda v: getattr(v, "kernel", None))
def test_an_odd_vocabulary_keeps_vectors(launch: Launch, variant: Variant, loads: int, stores: int) -> None:
    """Where rows lie as in the driver's workspace; and the kernel is that of an even one."""
    (kernel,) = launch("sm_90", variant.but(vocabulary=CUT))
    used = resources(kernel)
    assert (used.load_bytes, used.store_bytes) == (loads, stores)
    assert launch("sm_90", variant.but(vocabulary=151936)) == [kernel]


LOOP = re.compile(r"^(\$L__BB\w+):(.*?)\bbra(?:\.uni)?\s+\1;", re.MULTILINE | re.DOTALL)
BIASES = {"bias": True, "teacher_bias": True}
WALKERS = [
    plain("rows.token_nll", gradient=True),
    like("rows.token_nll"),
    plain("rows.token_nll_entropy", gradient=False),
    plain("top_k.tail_sums", gradient=False),
    like("rows.token_nll", bias=True),
    plain("cross_entropy.cross_entropy", gradient=True),
    plain("cross_entropy.cross_entropy", gradient=True, label_smoothing=0.1, class_weight=True, ids=True, bias=True),
    *[like("divergence.divergence", kind=kind) for kind in DIVERGENCES],
    *[plain("divergence.divergence", gradient=True, kind=kind, extras=True, tokens=True) for kind in DIVERGENCES],
    plain("divergence.divergence", gradient=True, kind="jsd", extras=True, tokens=True, hard=True).but(**BIASES),
    *[
        plain(name, gradient="gradient" in name or "entropy" not in name, **more).but(capped=True)
        for name, more in (
            ("rows.token_nll", {}),
            ("rows.token_nll_entropy", {}),
            ("cross_entropy.cross_entropy", {}),
            ("divergence.divergence", {"kind": "jsd", "capped_teacher": True} | BIASES),
        )
    ],
]


@pytest.mark.parametrize("variant", WALKERS, ids=lambda v: f"{v.kernel}-{v.config}")
def test_threads_walk_on_their_own(launch: Launch, variant: Variant) -> None:
    """In no loop over blocks does a thread wait for another: rows are reduced once, at the end."""
    loops = [body for _, body in LOOP.findall(launch("sm_90", variant)[0].asm["ptx"])]
    assert len(loops) > 0
    for body in loops:
        assert "ld.global" in body
        assert not re.search(r"bar\.sync|barrier|shfl", body)


ANOTHER_CALL = [(1, 0), (16, 0), (17, 1), (3, 5), (32, 16)]  # rows, and where results and tokens stand in their buffers
ROWS = [
    like("rows.token_nll", dtypes=(FP32, None), capped=True, vocabulary=32000),
    like("rows.token_nll_entropy", dtypes=(FP32, None), capped=True, vocabulary=32000),
    like("rows.entropy_gradient", dtypes=(FP32, FP32), capped=True, vocabulary=32000),
    like("cross_entropy.cross_entropy", dtypes=(FP32, None), capped=True, label_smoothing=0.1, vocabulary=32000),
    like("rows.clear_rows", dtypes=(FP32, FP32), vocabulary=32000),
    like("top_k.tail_sums", dtypes=(FP32, None), capped=True, vocabulary=32000),
    like("top_k.tail_gradient", dtypes=(FP32, FP32), capped=True, vocabulary=32000),
    like("divergence.divergence", kind="jsd", dtypes=(FP32, None), capped=True, extras=True, vocabulary=32000),
]


@pytest.mark.parametrize("variant", ROWS, ids=lambda v: v.kernel)
def test_nothing_is_compiled_again_for_another_chunk(launch: Launch, variant: Variant) -> None:
    """Another number of rows, another place of the chunk in its call, another cap or parameter: the same kernel."""
    first = launch("sm_90", variant)
    for n, offset in ANOTHER_CALL:
        assert launch("sm_90", variant, n, offset) == first
    assert launch("sm_90", variant.but(vocabulary=50256)) == first
    assert launch("sm_90", variant.but(vocabulary=50257)) != first


@pytest.mark.parametrize("name", ["token_nll", "reverse_kl"])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_nothing_is_compiled_again_for_another_batch(launch: Launch, chip: str, name: str) -> None:
    """Another number of rows, another place of the tokens and values in theirs, another temperature: the same kernels."""
    variant = like(f"score.{name}")
    first = launch(chip, variant)
    for n, offset in (*ANOTHER_CALL, (4096, 16)):
        assert launch(chip, variant, n, offset) == first


def test_equals_cannot_differ_by_a_fused_multiplication(launch: Launch) -> None:
    """p − q with the product of either one fused into it would not be 0 where p = q."""
    (kernel,) = launch("sm_90", plain("divergence.divergence", gradient=True, kind="forward_kl"))
    assert not kernel.metadata.enable_fp_fusion
    gradient = kernel.asm["ptx"].rpartition("ld.global")[2]  # what comes after the last load
    logarithms = re.findall(r"fma\S*\s+(%\w+),", gradient)
    assert len(logarithms) > 0
    for register in logarithms:  # of the probabilities alone
        assert re.search(rf"ex2\S*\s+%\w+, {register};", gradient)


def test_operands_travel_by_descriptor(launch: Launch) -> None:
    for dim, by_descriptor in ((512, True), (520, True), (513, False)):
        ptx = launch("sm_90", like("score.token_nll", operands=(BF16, dim)))[0].asm["ptx"]
        assert ("cp.async.bulk.tensor" in ptx) == by_descriptor
    assert "cp.async.cg" in launch("sm_80", like("score.token_nll"))[0].asm["ptx"]


@pytest.mark.parametrize("name", ["token_nll", "reverse_kl"])
def test_tiles_share_one_pipeline(launch: Launch, name: str) -> None:
    """Of one head or two: the steps of D that fill the pipeline are issued once, before the loop."""
    kernel = launch("sm_90", like(f"score.{name}"))[0]
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    assert ttgir.count("scf.for") == 1
    assert ptx.count("wgmma.mma_async") == 4  # a step of 64 in products of 16
    assert ptx.count("cp.async.bulk.tensor") == 2 * 4  # two operands; 3 steps ahead, and the loop's own
    assert buffers(kernel) == [4, 4]


@pytest.mark.parametrize("name", ["token_nll", "reverse_kl"])
def test_products_are_waited_for_where_they_are_read(launch: Launch, name: str) -> None:
    """A step waits for the one before; where a tile ends each branch that reads the product waits for all."""
    ttgir = launch("sm_90", like(f"score.{name}"))[0].asm["ttgir"]
    loop = ttgir[ttgir.index("scf.for") :]
    waits = re.findall(r"warp_group_dot_wait .*?pendings = (\d)", loop)
    branches = {"token_nll": 1, "reverse_kl": 2}[name]
    assert waits == ["1", *["0"] * branches, "0"]  # and after the loop


def test_probabilities_leave_by_descriptor(launch: Launch) -> None:
    """The product of the epilogue plan is pipelined as scores are, again where a row was wrong; no float32 is stored."""
    _, first, merge, again, _ = launch("sm_90", like("epilogue.reference"))
    for product in (first, again):
        ptx, ttgir = product.asm["ptx"], product.asm["ttgir"]
        loop = ttgir[ttgir.index("scf.for") :]
        assert re.findall(r"warp_group_dot_wait .*?pendings = (\d)", loop) == ["1", "0", "0"]
        assert buffers(product) == [4, 4]
        assert "cp.async.bulk.tensor.2d.global" in ptx
        assert resources(product).tensor_core == "wgmma"
    assert resources(merge).tensor_core is None


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_gathered_rows_are_three_steps_ahead(launch: Launch, chip: str) -> None:
    """The ids that they are gathered by take no buffer; two programs share a multiprocessor."""
    (kernel,) = launch(chip, like("sparse.hidden_gradient"))
    assert buffers(kernel) == [3, 3]
    assert 2 * resources(kernel).shared_bytes <= CHIPS[chip].shared_memory


def buffers(kernel: Any) -> list[int]:
    """How many steps of each operand shared memory holds."""
    return [
        int(count) for count in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d)x\d+x\d+x", kernel.asm["ttgir"])
    ]


@pytest.mark.parametrize("summed", [False, True], ids=["plain", "summed"])
def test_compaction_loads_before_it_stores(launch: Launch, summed: bool) -> None:
    """On a chip whose barriers do not wait for loads: all have arrived before a barrier, and the store of û follows one."""
    assembly = launch("gfx942", like("sparse.compact", summed=summed))[0].asm["amdgcn"]
    places = [place.start() for place in re.finditer("buffer_store", assembly)]
    blocks = [assembly[assembly.rindex(".LBB0_", 0, place) : place] for place in places]
    assert ["s_barrier" in block for block in blocks].count(
        True
    ) == 1  # the other one is of zeros beyond the vocabulary
    assert len(blocks) == 2
    assert not any("buffer_load" in block for block in blocks)
    after_loads = assembly.rpartition("buffer_load")[2]
    assert re.search(r"vmcnt\(0\).*?s_barrier", after_loads, re.DOTALL)
