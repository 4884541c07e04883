"""`python -m bench kernels`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_cases import bench_refusal
from launches import REPOSITORY

from bench.__main__ import main
from bench.commands import kernels
from bench.variants.aot import CHIPS


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
            *("spill_bytes", "shared_bytes", "load_bytes", "store_bytes", "tensor_core", "code_bytes"),
        ]
        wide = "151665" in row["config"] or "bias" in row["config"]  # of other rows the bias alone is read in vectors
        expected = (16 if wide else 8) if row["target"] == "sm_90" else None
        assert row["load_bytes"] == expected
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
        (["--kernel", ","], "--kernel: names no kernel"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in bench_refusal(capsys, "kernels", *arguments)


def test_targets_are_the_chips() -> None:
    assert set(kernels.TARGETS) == set(CHIPS)


def test_without_triton_the_bench_says_so() -> None:
    code = "import sys; sys.modules['triton'] = None; from bench.__main__ import main; main(['kernels'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    assert "compiling kernels needs triton >= 3.6" in done.stderr
