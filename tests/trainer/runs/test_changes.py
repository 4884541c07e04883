"""A run that goes on with other settings: which may change at once, which when asked to, and which never."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from run_cases import check_equal, distilled, fresh_accelerate, interrupt, log, refusal, tuned
from run_settings import Settings, arguments, config, distillation, training
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import save_model

from fastkl import cli
from fastkl.trainer.config.training import DistillConfig, SftConfig, as_dict
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.changes import FIXED, FREE
from fastkl.trainer.runs.folder import RunFolder, check_run_folder
from fastkl.trainer.runs.settings import flat
from fastkl.trainer.student import Student

NEVER = {
    "student.path",
    "teacher.path",
    "data.path",
    "data.offset",
    "seed",
    "mixture",
    "environment.name",
    "student.lora.rank",
}
AT_ONCE = {"log_samples", "trackers", "eval.every", "checkpoint.every", "checkpoint.keep", "batch.max_tokens"}


def settings(folder: Path, run: Path, **overrides: object) -> Settings:
    options: Settings = {"optim__steps": 4, "optim__schedule": "cosine", "checkpoint__every": 2}
    return distillation(run, folder, **{**options, **overrides})


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests copy it."""
    return distilled(settings(folder, tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("kind", [DistillConfig, SftConfig])
def test_every_setting_is_free_fixed_or_changes_when_asked_to(kind: type, folder: Path, tmp_path: Path) -> None:
    command = "distill" if kind is DistillConfig else "sft"
    make = distillation if kind is DistillConfig else training
    names = {name for name, _ in flat(as_dict(config(command, make(tmp_path / "run", folder))))}
    assert {name for name in names if FREE.fullmatch(name)} >= AT_ONCE
    assert {n for n in NEVER if n in names} <= {name for name in names if FIXED.fullmatch(name)}
    asked = {name.split(".")[0] for name in names if not FREE.fullmatch(name) and not FIXED.fullmatch(name)}
    assert {"optim", "eval"} <= asked <= {f.name for f in dataclasses.fields(kind)}


def test_a_run_of_another_command_is_named(folder: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match="holds a distill run, not an sft run; choose another run folder"):
        check_run_folder(config("sft", training(run, folder)))
    (run / "config.yaml").write_text(yaml.safe_dump(as_dict(config("sft", training(run, folder)))))
    with pytest.raises(ConfigError, match="holds an sft run, not a distill run"):
        check_run_folder(config("distill", distillation(run, folder)))


FREELY: dict[str, Settings] = {
    "logs-and-checkpoints": {"log_samples": 2, "eval__every": 1, "checkpoint__every": 1, "checkpoint__keep": 3},
    "less-memory": {"batch__max_tokens": 40, "student__gradient_checkpointing": "true"},
}


@pytest.mark.parametrize("changed", FREELY.values(), ids=FREELY)
def test_what_a_run_computes_does_not_depend_on_these(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: Settings
) -> None:
    interrupt(monkeypatch, settings(folder, tmp_path / "run"), 3)
    path = distilled(settings(folder, tmp_path / "run", **changed))
    for ours, theirs in zip(log(path), log(finished), strict=True):
        del ours["flops/student"], theirs["flops/student"]  # checkpointing computes more, and says so
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert not (path / "changes.jsonl").exists()
    written = yaml.safe_load((path / "config.yaml").read_text())
    assert written["batch"]["max_tokens"] == changed.get("batch__max_tokens", 16384)


def test_a_finished_run_grows(folder: Path, run: Path, tmp_path: Path) -> None:
    """Adam's state, the order of the data and the steps' numbers go on: with a constant rate it is the longer run."""
    constant = {"optim__schedule": "constant"}
    short = distilled(settings(folder, tmp_path / "short", **constant))
    grown = distilled(settings(folder, short, **constant, optim__steps=6, resume="change"))
    check_equal(grown, distilled(settings(folder, tmp_path / "long", **constant, optim__steps=6)))
    assert read_jsonl(grown / "changes.jsonl") == [{"step": 4, "setting": "optim.steps", "was": 4, "is": 6}]


def test_a_changed_rate_is_used_from_the_next_step_on(folder: Path, run: Path) -> None:
    changed: Settings = {"optim__steps": 6, "optim__lr": 0.003, "optim__betas": "[0.8, 0.9]", "loss__method": "ppo"}
    refused = settings(folder, run, **changed)
    with pytest.raises(ConfigError, match=r"optim.lr was 0.01 and is 0.003.*--resume change"):
        check_run_folder(config("distill", refused))
    distilled(refused | {"resume": "change"})
    rates = [row["optim/lr"] for row in log(run)]
    assert rates[4:] == pytest.approx([0.003 * (1 + math.cos(math.pi * step / 6)) / 2 for step in (4, 5)])
    text = (run / "config.yaml").read_text()
    assert "# optim.lr: 0.01 until step 4, 0.003 after it\n" in text
    assert yaml.safe_load(text)["optim"]["betas"] == [0.8, 0.9]
    changes = {row["setting"]: row["step"] for row in read_jsonl(run / "changes.jsonl")}
    assert changes == dict.fromkeys(("optim.steps", "optim.lr", "optim.betas", "loss.method"), 4)
    before = (run / "metrics.jsonl").read_bytes()
    distilled(refused)  # it is the run's own now, and has nothing left to do
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", sorted(NEVER - {"mixture", "environment.name"}))
def test_some_settings_never_change(folder: Path, run: Path, name: str) -> None:
    other = {"seed": 3, "student.lora.rank": 2, "data.offset": 1}.get(name, folder / "elsewhere")
    changed = settings(folder, run) | {name: other, "optim.lr": 0.5, "resume": "change"}
    with pytest.raises(ConfigError, match=rf"Within a run {name} cannot change"):
        check_run_folder(config("distill", changed))


def test_a_setting_that_was_not_there_yet_had_its_default(folder: Path, run: Path) -> None:
    before = yaml.safe_load((run / "config.yaml").read_text())
    del before["optim"]["max_skipped"], before["sampling"], before["student"]["lora"]["alpha"]
    (run / "config.yaml").write_text(yaml.safe_dump(before))
    same = {name: value for name, value in settings(folder, run).items() if not name.startswith("sampling.")}
    assert check_run_folder(config("distill", same)) == []
    with pytest.raises(ConfigError, match=r"optim\.max_skipped was 10 and is 3"):
        check_run_folder(config("distill", same | {"optim.max_skipped": 3}))


@pytest.mark.parametrize("text", ["a: [", "just text", "- 1", "\x00", "optim: 3"], ids=ascii)
def test_a_config_that_cannot_be_read_is_one_sentence(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (run / "config.yaml").write_text(text)
    error = refusal(capsys, "distill", settings(folder, run), str(run))
    assert len(error.strip().splitlines()) == 1


@pytest.fixture
def own(tmp_path: Path, folder: Path) -> Path:
    """Models and rows of this test alone."""
    for name in ("student", "teacher"):
        shutil.copytree(folder / name, tmp_path / "own" / name)
    write_jsonl(tmp_path / "own" / "sums.jsonl", sums())
    return tmp_path / "own"


def test_other_rows_and_weights_under_the_same_settings_are_refused(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = settings(own, tmp_path / "run", checkpoint__keep=2)
    path = distilled(same)
    shutil.rmtree(path / "checkpoints" / "step-000004")
    others = {"the rows of data": lambda: write_jsonl(own / "sums.jsonl", sums()[::-1])}
    others["the student's weights"] = lambda: save_model(own / "student", seed=5)
    others["the weights of the teacher"] = lambda: save_model(own / "teacher", seed=6)
    for name, change in others.items():
        kept = Path(shutil.copytree(own, tmp_path / "kept"))
        change()
        fresh_accelerate()
        refusal(capsys, "distill", same, f"{name} changed since the run began")
        shutil.rmtree(own)
        kept.rename(own)
    distilled(same)


def test_other_rows_of_a_supervised_run_are_refused(own: Path, tmp_path: Path) -> None:
    same = training(tmp_path / "run", own, examples_per_step=4, checkpoint__every=1, optim__steps=1)
    tuned(same)
    write_jsonl(own / "sums.jsonl", sums()[::-1])
    with pytest.raises(ConfigError, match="the rows of data changed since the run began"):
        tuned(same)


@pytest.mark.parametrize("student", [True, False], ids=["finished", "interrupted"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str], student: bool
) -> None:
    shutil.rmtree(run / "checkpoints")
    if not student:
        shutil.rmtree(run / "student")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refusal(capsys, "distill", settings(folder, run), "a run of 4 steps, but its checkpoints are gone")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_was_stopped_is_not_begun_again_either(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint came before the first that was due."""
    same = settings(folder, tmp_path / "run", checkpoint__every=50)
    with monkeypatch.context() as patch:
        patch.setattr(Student, "update", lambda self, *_: os.kill(os.getpid(), signal.SIGTERM) or {})
        assert cli.main(arguments("distill", same)) == 143
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="a run of 1 steps, but its checkpoints are gone"):
        RunFolder(config("distill", same))


def test_nothing_is_left_to_change(folder: Path, run: Path) -> None:
    before = (run / "config.yaml").read_bytes()
    for changed in ({"optim.steps": 3}, {"optim.lr": 0.1}):
        with pytest.raises(ConfigError, match="nothing is left to do with optim"):
            RunFolder(config("distill", settings(folder, run) | changed | {"resume": "change"}))
    assert (run / "config.yaml").read_bytes() == before


def test_a_change_counts_from_the_step_that_is_taken_again(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint that it was made after is damaged."""
    same = settings(folder, tmp_path / "two", checkpoint__keep=5)
    distilled(same)
    changed = same | {"optim.steps": 6, "resume": "change"}
    with RunFolder(config("distill", changed)) as opened:
        opened.begin()
    (tmp_path / "two" / "checkpoints" / "step-000004" / "state.pt").unlink()
    assert cli.main(arguments("distill", changed)) == 0
    assert "resumed" in capsys.readouterr().err
    assert [row["step"] for row in read_jsonl(tmp_path / "two" / "changes.jsonl")] == [2]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_student_that_is_no_folder_is_left_alone(folder: Path, run: Path, tmp_path: Path, kind: str) -> None:
    (run / "student").rename(tmp_path / "elsewhere")
    if kind == "link":
        (run / "student").symlink_to(tmp_path / "elsewhere")
    else:
        (run / "student").write_text("mine")
    with pytest.raises(ConfigError, match="is a link or a file"):
        RunFolder(config("distill", settings(folder, run, optim__steps=6, resume="change")))


def test_a_path_may_be_written_in_another_way(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    same = settings(folder, run) | {"student.path": "student", "data.path": "./sums.jsonl"}
    assert check_run_folder(config("distill", same)) == []


@pytest.mark.parametrize("place", ["file/run", "dangling", "n" * 300, "/proc/run", "/sys/run"], ids=lambda p: p[:9])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    monkeypatch.setattr("fastkl.trainer.distill.load_tokenizer", lambda *_: pytest.fail("something was loaded"))
    error = refusal(capsys, "distill", settings(folder, tmp_path / place), "choose another run folder")
    assert len(error.strip().splitlines()) == 1


def test_a_refused_run_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    for path, was_there in ((tmp_path / "new" / "run", False), (tmp_path / "empty", True)):
        if was_there:
            path.mkdir()
        with pytest.raises(ConfigError), RunFolder(config("distill", settings(folder, path))):
            raise ConfigError("a check of the models")
        assert path.exists() == was_there


def test_a_folder_that_is_deleted_meanwhile_hides_no_error(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"

    def trained() -> None:
        shutil.rmtree(path)
        raise ConfigError("the real one")

    with pytest.raises(ConfigError, match="the real one"), RunFolder(config("distill", settings(folder, path))):
        trained()


def test_report_that_was_never_written(folder: Path, run: Path) -> None:
    """A run that was killed between its last checkpoint and its report."""
    (run / "report.html").unlink()
    assert cli.main(arguments("distill", settings(folder, run))) == 0
    assert (run / "report.html").is_file()
