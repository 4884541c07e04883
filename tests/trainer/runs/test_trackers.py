"""Trackers, for real: what a run writes, read back with their own readers. Each is skipped where it is not installed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_cases import interrupt, tuned
from run_settings import config, evaluated, training
from tiny_data import read_jsonl

from fastkl.trainer.runs.folder import flat_settings

Rows = list[dict[str, Any]]


def tracked(path: Path, folder: Path, tracker: str) -> tuple[Path, dict[str, Any], Rows]:
    """The folder, flat settings and metrics of a short run with a tracker."""
    small = evaluated(folder, eval__max_new_tokens=3)
    settings = training(path / "run", folder, examples_per_step=4, trackers=f'["{tracker}"]', **small)
    run = tuned(settings)
    return run, flat_settings(config("sft", settings)), read_jsonl(run / "metrics.jsonl")


def gone_on(path: Path, folder: Path, tracker: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Rows]:
    """A run with a tracker that was interrupted after its checkpoint and went on: its folder and metrics."""
    settings = training(path / "run", folder, examples_per_step=4, trackers=f'["{tracker}"]', checkpoint__every=1)
    interrupt(monkeypatch, settings, 2, "sft")
    run = tuned(settings)
    return run, read_jsonl(run / "metrics.jsonl")


def values_of(rows: Rows) -> dict[str, list[tuple[int, Any]]]:
    """(step, value) of each metric; trackers may keep float32."""
    names = {name for row in rows for name in row} - {"step"}
    return {name: [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row] for name in names}


def test_tensorboard_has_the_metrics_and_the_settings(tmp_path: Path, folder: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, settings, rows = tracked(tmp_path, folder, "tensorboard")
    events = reader.EventAccumulator(str(run / "fastkl")).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == values_of(rows)
    (written,) = (run / "fastkl").glob("*/hparams.yml")
    assert yaml.safe_load(written.read_text()) == settings


def test_tensorboard_goes_on_with_a_run(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, rows = gone_on(tmp_path, folder, "tensorboard", monkeypatch)
    events = reader.EventAccumulator(str(run / "fastkl")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == values_of(rows)["loss"]


@pytest.fixture
def wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights & Biases that writes here alone; its process ends with the test."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield
    wandb.teardown()


@pytest.mark.usefixtures("wandb_offline")
def test_weights_and_biases_goes_on_with_a_run(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = gone_on(tmp_path, folder, "wandb", monkeypatch)
    files = tmp_path.glob("wandb/offline-run-*/*.wandb")  # one a start; one in all, if both were in one second
    runs = [record.run for file in files for record in wandb_records(file) if record.HasField("run")]
    assert {(run.run_id, run.display_name) for run in runs} == {((run / ".tracker").read_text().strip(), "run")}


@pytest.mark.usefixtures("wandb_offline")
def test_weights_and_biases_has_the_metrics_and_the_settings(tmp_path: Path, folder: Path) -> None:
    _, settings, rows = tracked(tmp_path, folder, "wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    found = {name: [(row["_step"], row[name]) for row in history if name in row] for name in values_of(rows)}
    assert found == values_of(rows)
    updates = [update for record in records for update in [*record.run.config.update, *record.config.update]]
    written = {"/".join(update.nested_key) or update.key: json.loads(update.value_json) for update in updates}
    assert {name: written.get(name) for name in settings} == settings


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of an offline run: blocks of 32 KiB, chunks with checksum, length and kind (whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def trackio_runs(run: Path) -> tuple[Any, list[str]]:
    """Trackio's storage, and its runs of the name that the run folder holds."""
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    name = (run / ".tracker").read_text().strip()
    return storage, [found for found in storage.get_runs("fastkl") if found == name]


@pytest.fixture
def trackio_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported for the first time
    pytest.importorskip("trackio")


@pytest.mark.usefixtures("trackio_here")
def test_trackio_has_the_metrics_and_the_settings(tmp_path: Path, folder: Path) -> None:
    path, settings, rows = tracked(tmp_path, folder, "trackio")
    storage, (run,) = trackio_runs(path)
    logs = storage.get_logs("fastkl", run)
    found = {name: [(log["step"], log[name]) for log in logs if name in log] for name in values_of(rows)}
    assert found == values_of(rows)
    written = storage.get_run_config("fastkl", run)
    assert {name: written.get(name) for name in settings} == settings


@pytest.mark.usefixtures("trackio_here")
def test_trackio_goes_on_with_a_run(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = gone_on(tmp_path, folder, "trackio", monkeypatch)
    storage, (run,) = trackio_runs(path)
    assert [log["step"] for log in storage.get_logs("fastkl", run)] == [1, 2, 3]


def test_settings_are_flat_and_plain(tmp_path: Path, folder: Path) -> None:
    flat = flat_settings(config("sft", training(tmp_path / "run", folder)))
    assert flat["optim.lr"] == 0.01
    assert flat["optim.betas"] == "[0.9, 0.95]"
    assert flat["student.attn_implementation"] == "null"
    assert flat["student.lora.rank"] == 0
    assert {type(value) for value in flat.values()} <= {str, int, float, bool}
