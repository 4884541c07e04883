"""The divergence kernels compiled for GPUs that are not there: what test_kernels_compile.py says of the row functions.

`-s` shows the registers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.aot import CHIPS, compiler, resources
from bench.divergence_variants import REPRESENTATIVE, DivergenceVariant, divergence_variants
from fastkl.kernels.divergence_triton import REGISTERS
from fastkl.kernels.rows_triton import launch_config

Launch = Callable[..., Any]
SAMPLE = 13  # one variant in so many, others on each chip: minutes, not an hour


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launch]:
    """(chip, variant) -> the compiled kernel that the launcher would run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiler() as compile_launch:

        def run(chip: str, variant: DivergenceVariant, n: int = 2, offset: int = 0) -> Any:
            (compiled,) = compile_launch(chip, lambda: variant.launch(n, offset))
            assert compiled.name == variant.kernel
            return compiled.kernel

        yield run


def assert_fits(kernel: Any, chip: str, variant: DivergenceVariant) -> None:
    """No spills, shared memory within the chip's; room for two programs, or with extras for one."""
    used = resources(kernel)
    print(f"\n{chip} {variant.config}: {used.registers} registers")
    assert used.spill_bytes == 0
    assert used.shared_bytes <= CHIPS[chip].shared_memory
    if CHIPS[chip].target.backend == "cuda":
        programs, threads = 1 if variant.extras else 2, 32 * kernel.metadata.num_warps
        assert programs * used.registers * threads <= REGISTERS, used


@pytest.mark.parametrize("variant", REPRESENTATIVE, ids=lambda v: v.config)
@pytest.mark.parametrize("chip", CHIPS)
def test_variant_fits(launch: Launch, chip: str, variant: DivergenceVariant) -> None:
    assert_fits(launch(chip, variant), chip, variant)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_many_variants_fit(launch: Launch, chip: str) -> None:
    for variant in list(divergence_variants())[list(CHIPS).index(chip) :: SAMPLE]:
        assert_fits(launch(chip, variant), chip, variant)


def test_representatives_are_variants() -> None:
    assert set(REPRESENTATIVE) <= set(divergence_variants())


@pytest.mark.parametrize(("kind", "walks"), [("forward_kl", 2), ("total_variation", 3)])
def test_rows_are_read_and_written_in_vectors(launch: Launch, kind: Any, walks: int) -> None:
    """16 bytes per thread and access wherever the width allows; each walk reads both chunks once, the last one writes."""
    variant = DivergenceVariant(kind, torch.float32, torch.float32, False, False, True, False, 151936)
    ptx = launch("sm_90", variant).asm["ptx"]
    config = launch_config(chunks=2)
    vectors = config.block // (32 * config.num_warps) // 4  # per chunk and walk
    assert len(re.findall(r"ld\.global[.\w:]*\.v4", ptx)) == walks * vectors * 2
    assert len(re.findall(r"st\.global[.\w:]*\.v4", ptx)) == vectors


def test_equals_cannot_differ_by_a_fused_multiplication(launch: Launch) -> None:
    """p − q with the product of either one fused into it would not be 0 where p = q."""
    variant = DivergenceVariant("forward_kl", torch.float32, torch.float32, False, False, True, False, 151936)
    kernel = launch("sm_90", variant)
    assert not kernel.metadata.enable_fp_fusion
    gradient = kernel.asm["ptx"].rpartition("ld.global")[2]  # what comes after the last load
    assert "fma" not in gradient


def test_nothing_is_compiled_again_for_another_chunk(launch: Launch) -> None:
    """Another number of rows, another place of the chunk in its call, another cap or parameter: the same kernel."""
    variant = DivergenceVariant("jsd", torch.float32, None, True, False, True, True, 32000)
    first = launch("sm_90", variant)
    for n, offset in ((1, 0), (16, 0), (17, 1), (3, 5), (32, 16)):
        assert launch("sm_90", variant, n, offset) is first
    assert launch("sm_90", variant._replace(vocabulary=50256)) is first
    assert launch("sm_90", variant._replace(vocabulary=50257)) is not first
