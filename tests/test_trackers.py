"""Trackers, for real: what a run writes, read back with their own readers. Each is skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from run_cases import fresh_accelerate
from tiny import config, model_and_sums, read_jsonl, save_model, training

from fastkl.trainer.runs.folder import flat_settings
from fastkl.trainer.sft import sft


def test_tensorboard_has_the_metrics_and_the_settings(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fresh_accelerate()
    model_and_sums(tmp_path, "student")
    settings = config(
        "sft",
        training(
            tmp_path / "run",
            tmp_path / "student",
            tmp_path / "sums.jsonl",
            examples_per_step=4,
            trackers='["tensorboard"]',
            eval__data__path=tmp_path / "sums.jsonl",
            eval__max_new_tokens=3,
        ),
    )
    run = sft(settings).path
    events = reader.EventAccumulator(str(run / "fastkl")).Reload()
    rows = read_jsonl(run / "metrics.jsonl")
    names = {name for row in rows for name in row} - {"step"}
    assert names == set(events.Tags()["scalars"])
    for name in names:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
    (written,) = (run / "fastkl").glob("*/hparams.yml")
    assert yaml.safe_load(written.read_text()) == flat_settings(settings)


def test_settings_are_flat_and_plain(tmp_path: Path) -> None:
    save_model(tmp_path / "student")
    flat = flat_settings(config("sft", training(tmp_path / "run", tmp_path / "student", tmp_path / "sums.jsonl")))
    assert flat["optim.lr"] == 0.01
    assert flat["optim.betas"] == "[0.9, 0.95]"
    assert flat["student.attn_implementation"] == "null"
    assert flat["student.lora.rank"] == 0
    assert {type(value) for value in flat.values()} <= {str, int, float, bool}
