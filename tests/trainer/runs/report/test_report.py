"""`fastkl report`: when it is written, by a run and by the command, and which folders and files it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_cases import Page, make_run
from run_cases import counted, distilled, tuned
from run_settings import distillation, training
from tiny_data import read_jsonl

from fastkl import cli
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.report import page as report
from fastkl.trainer.runs.report.page import write_report


def test_training_writes_a_report(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distil, tune = distilled(distillation(tmp_path / "a", folder)), tuned(training(tmp_path / "b", folder))
    error = capsys.readouterr().err
    assert f"report in {distil / 'report.html'}" in error
    assert f"report in {tune / 'report.html'}" in error

    (run,) = Page(distil / "report.html").data["runs"]
    assert (run["kind"], run["steps_done"], run["steps_planned"]) == ("distill", 3, 3)
    assert {"teacher_kl", "entropy", "loss", "sampler_mismatch/mean_abs", "time/sample"} <= run["series"].keys()
    assert run["seconds"].keys() == {"sample", "teacher", "old_logprobs", "ranks", "train"}
    assert run["x"].keys() == {"step", "tokens", "flops"}
    assert run["settings"]["optim.lr"] == "0.01"
    records = read_jsonl(distil / "samples.jsonl")
    assert run["x"]["tokens"][-1] == sum(sum(record["loss_mask"]) for record in records)
    assert run["samples"]["count"] == len(records) == 18
    first, record = run["samples"]["shown"][0], records[0]
    assert first["tokens"] == record["tokens"]
    assert len(first["sampler"]) == len(first["teacher"]) == first["mask"].count("1") == sum(record["loss_mask"])
    for field in ("student_ranks", "teacher_ranks"):
        assert first[field] == counted(record, field)
        assert min(first[field]) >= 1
    assert first["teacher"][0] == pytest.approx(record["teacher_logprobs"][record["loss_mask"].index(True)], abs=1e-3)

    (run,) = Page(tune / "report.html").data["runs"]
    assert run["kind"] == "sft"
    assert "teacher_kl" not in run["series"]
    assert all(shown["sampler"] == shown["teacher"] == [] for shown in run["samples"]["shown"])


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(report, "write_report", broken)
    done = tuned(training(tmp_path / "run", folder, optim__steps=1))
    assert (done / "student" / "config.json").is_file()
    assert "no report was written (MemoryError: no room); `fastkl report" in capsys.readouterr().err


def test_its_own_older_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes() == first
    (run / "report.html").write_text("my notes")
    with pytest.raises(ConfigError, match="no report of fastkl's; move it away or choose another name"):
        write_report([run])
    assert (run / "report.html").read_text() == "my notes"


def empty_run(folder: Path) -> None:
    make_run(folder, rows=[])


def no_run(folder: Path) -> None:
    folder.mkdir()


def bad_settings(folder: Path) -> None:
    make_run(folder)
    (folder / "config.yaml").write_text("optim: [")


def no_settings(folder: Path) -> None:
    make_run(folder)
    (folder / "config.yaml").write_text("nothing")


@pytest.mark.parametrize(
    ("prepare", "line", "parts"),
    [
        (no_run, ["run"], ["run/config.yaml does not exist", "name a run folder"]),
        (no_run, ["missing"], ["missing/config.yaml does not exist", "name a run folder"]),
        (empty_run, ["run"], ["run/metrics.jsonl has no complete row yet", "report again"]),
        (bad_settings, ["run"], ["run/config.yaml cannot be read as YAML"]),
        (no_settings, ["run"], ["run/config.yaml holds no settings", "name a run folder"]),
        (make_run, ["run", "other"], ["output is not set", "2 runs", "--output FILE"]),
        (make_run, ["run", "run", "--output", "o.html"], ["named twice", "name each once"]),
        (make_run, ["run", "--output", "run"], ["output run is a folder", "run/report.html"]),
        (make_run, ["run", "--output", "run/config.yaml"], ["run/config.yaml exists already", "another name"]),
        (make_run, ["run", "--output", "run/config.yaml/o.html"], ["cannot be written", "choose another"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else getattr(value, "__name__", None),
)
def test_refused_command_lines(
    prepare: Any,
    line: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(Path("run"))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", *line]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastkl: ")
    assert error.count("\n") == 1
    assert [part for part in parts if part not in error] == [], error
    assert sorted(tmp_path.rglob("*")) == before


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path(name)) for name in ("a", "b")]
    assert cli.main(["report", "a"]) == 0
    assert cli.main(["report", "a", "b", "--output", "pages/both.html"]) == 0
    assert capsys.readouterr().out == "report written to a/report.html\nreport written to pages/both.html\n"
    assert len(Page(Path("pages/both.html")).data["runs"]) == len(runs)
    for line, status in ((["report"], 2), (["report", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(line)
        assert stop.value.code == status
    assert "fastkl report RUN [RUN ...] [--output FILE]" in capsys.readouterr().out
