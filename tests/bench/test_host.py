"""`python -m bench host`: its rows, and what it counts as held."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bench_cases import bench_refusal
from tiny_models import tokenizer

from bench.__main__ import main
from bench.commands.host import PARTS, STEP, held_bytes
from bench.lib.prompt_memory import CHARACTERS
from bench.lib.prompt_memory import PARTS as PROMPT_PARTS
from fastkl.trainer.data.samples import make_sample


def test_bench_measures_each_part_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "host.json"
    main(["host", "--tokens", "2000", "--repeats", "1", "--json", str(file)])
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert list(row) == ["tokens", "samples", "bytes", *PARTS, "step"]
    assert capsys.readouterr().out.split()[: len(row)] == list(row)
    assert row["tokens"] >= 2000
    assert min(row[part] for part in PARTS) >= 0
    assert row["step"] == pytest.approx(sum(row[part] for part in STEP))


@pytest.mark.slow
def test_bench_measures_prompts(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = ["--prompts", "200", "--tokenizer", str(tmp_path / "tokenizer")]
    main(["host", "--tokens", "2000", "--repeats", "1", *given, "--json", str(file)])
    (row,) = json.loads(file.read_text(encoding="utf-8"))["prompts"]
    assert row["prompts"] == 200
    assert CHARACTERS[0] <= row["tokens"] <= CHARACTERS[1]  # a token each
    assert row["held"] <= row["peak"]
    assert min(row[part] for part in PROMPT_PARTS) > 0


@pytest.mark.parametrize(
    "words", [("--tokens", "0"), ("--repeats", "0"), ("--prompts", "2"), ("--json", "none/host.json")], ids=str
)
def test_refusals(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"argument {words[0]}: " in bench_refusal(capsys, "host", *words)


def test_what_samples_share_is_held_once() -> None:
    one, other = (make_sample([1, 2], [3, 4], 0, [-0.5, -0.25]) for _ in range(2))
    apart = held_bytes([one, other])
    other.ids = one.ids
    assert apart - held_bytes([one, other]) >= np.array(one.ids).nbytes
