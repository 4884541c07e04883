"""The Triton kernels compiled for GPUs that are not there: every variant that the launcher can ask for must fit its chip.

`-s` shows the registers, and `python -m bench kernels` all of it as a table.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import REPOSITORY

from bench import kernels
from bench.__main__ import main
from bench.aot import CHIPS, Compile, compiler, resources
from bench.variants import RowVariant, row_variants
from fastkl.kernels.rows_triton import launch_config

Launch = Callable[..., Any]


@pytest.fixture
def compile_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compile]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiler() as compile_launch:
        yield compile_launch


@pytest.fixture
def launch(compile_launch: Compile) -> Launch:
    """(chip, variant) -> the compiled kernel that the launcher would run."""

    def run(chip: str, variant: RowVariant, n: int = 2, offset: int = 0) -> Any:
        (compiled,) = compile_launch(chip, lambda: variant.launch(n, offset))
        assert compiled.name == variant.kernel
        return compiled.kernel

    return run


def assert_fits(kernel: Any, chip: str) -> str:
    """No spills, no stack, shared memory within the chip's, room for two programs; returns a line about registers."""
    used = resources(kernel)
    assert used.spill_bytes == 0
    assert used.shared_bytes <= CHIPS[chip].shared_memory
    if CHIPS[chip].target.backend == "cuda":
        threads = 32 * kernel.metadata.num_warps
        assert 2 * used.registers * threads <= 65536, f"two programs must fit a multiprocessor: {used}"
    return f"{used.registers} registers"


@pytest.mark.parametrize(
    "variant", [v for v in row_variants() if v.representative], ids=lambda v: f"{v.name}-{v.config}"
)
@pytest.mark.parametrize("chip", CHIPS)
def test_variant_fits(launch: Launch, chip: str, variant: RowVariant) -> None:
    print(f"\n{chip} {variant.kernel} {variant.config}: {assert_fits(launch(chip, variant), chip)}")


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_variant_fits(launch: Launch, chip: str) -> None:
    for variant in row_variants():
        print(f"\n{chip} {variant.kernel} {variant.config}: {assert_fits(launch(chip, variant), chip)}")


@pytest.mark.parametrize("name", ["token_nll", "reverse_kl"])
def test_rows_move_in_vectors(launch: Launch, name: str) -> None:
    """16 bytes per thread and access wherever the width allows."""
    variant = RowVariant(name, torch.float32, torch.float32, False, False, True, 151936)
    ptx = launch("sm_90", variant).asm["ptx"]
    chunks = 1 if name == "token_nll" else 2
    config = launch_config(chunks)
    vectors = config.block // (32 * config.num_warps) // 4  # per chunk and pass
    assert len(re.findall(r"ld\.global[.\w:]*\.v4", ptx)) == 2 * vectors * chunks
    assert len(re.findall(r"st\.global[.\w:]*\.v4", ptx)) == vectors


@pytest.mark.parametrize("name", ["token_nll", "reverse_kl"])
def test_nothing_is_compiled_again_for_another_chunk(launch: Launch, name: str) -> None:
    """Another number of rows, another place of the chunk in its call, another cap: the same kernel."""
    variant = RowVariant(name, torch.float32, None, True, False, True, 32000)
    first = launch("sm_90", variant)
    for n, offset in ((1, 0), (16, 0), (17, 1), (3, 5), (32, 16)):
        assert launch("sm_90", variant, n, offset) is first
    assert launch("sm_90", variant._replace(vocabulary=50256)) is first
    assert launch("sm_90", variant._replace(vocabulary=50257)) is not first


def test_bench_lists_what_the_compiler_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    main(["kernels", "--target", "sm_90,gfx942", "--kernel", "rows.token_nll", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    table = capsys.readouterr().out
    assert {(row["kernel"], row["target"]) for row in rows} == {
        ("rows.token_nll", "sm_90"),
        ("rows.token_nll", "gfx942"),
    }
    for row in rows:
        assert list(row) == [
            *("kernel", "config", "target", "registers"),
            *("spill_bytes", "shared_bytes", "tensor_core", "code_bytes"),
        ]
        assert row["registers"] > 0
        assert row["spill_bytes"] == 0
        assert row["tensor_core"] is None
        assert 500 < row["code_bytes"] < 100_000
        assert row["config"] in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_75"], "--target: unknown target 'sm_75'; use some of sm_80, sm_90, sm_100, gfx942"),
        (["--kernel", "rows.softmax"], "--kernel: unknown kernel 'rows.softmax'; use some of "),
        (["--kernel", ","], "--kernel: names nothing"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["kernels", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_targets_are_the_chips() -> None:
    assert set(kernels.TARGETS) == set(CHIPS)


def test_without_triton_the_bench_says_so() -> None:
    code = "import sys; sys.modules['triton'] = None; from bench.__main__ import main; main(['kernels'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    assert "compiling kernels needs triton >= 3.6" in done.stderr
