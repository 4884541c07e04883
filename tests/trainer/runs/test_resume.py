"""Runs that end early: what is left can always be resumed, and the whole is the run that was never interrupted."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launches import CONTEXT, killed
from run_cases import check_equal, distilled, interrupt, log, refusal
from run_settings import Settings, arguments, config, distillation, evaluated
from safetensors.torch import load_file
from tiny_data import read_jsonl
from tiny_models import save_model

from fastkl import cli
from fastkl.trainer.distill import OnPolicy
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.files import read_jsonl as read_log
from fastkl.trainer.runs.folder import RunFolder, check_run_folder

STEPS = 6
OPTIONS: Settings = {
    "optim__steps": STEPS,
    "optim__warmup_steps": 3,
    "optim__schedule": "cosine",
    "checkpoint__every": 2,
    "student__dropout": "keep",
}


def settings(dropout: Path, run: Path, **overrides: object) -> Settings:
    return distillation(
        run, dropout, **{**OPTIONS, **evaluated(dropout, eval__every=2, eval__temperature=[0, 1]), **overrides}
    )


@pytest.fixture(scope="module")
def whole(dropout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted."""
    return distilled(settings(dropout, tmp_path_factory.mktemp("run") / "whole"))


@pytest.fixture
def run(tmp_path: Path, dropout: Path) -> Settings:
    """Settings of a run that is not there yet."""
    return settings(dropout, tmp_path / "run")


@pytest.fixture
def interrupted(run: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a run that Ctrl-C ended in step 3, counted from 0."""
    interrupt(monkeypatch, run, 3)
    return run


@pytest.fixture
def unchanged(whole: Path) -> Iterator[Path]:
    """The whole run, whose files a test must leave as they are."""
    before = snapshot(whole)
    yield whole
    assert snapshot(whole) == before


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# function, which call of it, before or after it: and the steps that are left to take then
MOMENTS: dict[str, tuple[str, int, bool, range]] = {
    "before-the-config-is-in-place": ("fastkl.trainer.runs.folder:os.replace", 1, False, range(6)),
    "after-the-config-is-in-place": ("fastkl.trainer.runs.folder:os.replace", 1, True, range(6)),
    "at-the-first-evaluation": ("fastkl.trainer.loop:evaluate", 1, False, range(6)),
    "while-sampling-before-any-checkpoint": (
        "fastkl.trainer.rollouts.samplers.generate:GenerateSampler.sample",
        3,
        False,
        range(6),
    ),
    "before-an-update": ("fastkl.trainer.student:Student.update", 4, False, range(2, 6)),
    "after-an-update": ("fastkl.trainer.student:Student.update", 4, True, range(2, 6)),
    "between-the-two-logs": ("fastkl.trainer.runs.folder:RunFolder.log", 8, True, range(2, 6)),
    "before-the-first-checkpoint": ("fastkl.trainer.runs.folder:RunFolder.save_checkpoint", 1, False, range(6)),
    "in-a-checkpoint-after-the-weights": ("fastkl.trainer.runs.checkpoint:save_file", 2, True, range(2, 6)),
    "in-a-checkpoint-after-the-optimizer": ("fastkl.trainer.runs.checkpoint:torch.save", 3, True, range(2, 6)),
    "before-a-checkpoint-is-renamed": ("fastkl.trainer.runs.folder:os.rename", 2, False, range(2, 6)),
    "after-a-checkpoint-is-renamed": ("fastkl.trainer.runs.folder:os.rename", 2, True, range(4, 6)),
    "before-the-last-checkpoint": ("fastkl.trainer.runs.folder:RunFolder.save_checkpoint", 3, False, range(4, 6)),
    "before-the-student-is-saved": ("fastkl.trainer.loop:save_student", 1, False, range(0)),
}


@pytest.mark.parametrize(("target", "call", "after", "left"), MOMENTS.values(), ids=MOMENTS)
def test_kill_and_resume(
    run: Settings, whole: Path, steps_run: list[int], target: str, call: int, after: bool, left: range
) -> None:
    assert killed(arguments("distill", run), target, call, after)
    check_equal(distilled(run), whole)
    assert steps_run == list(left)


def test_killed_again_and_again(run: Settings, whole: Path) -> None:
    """At moments that no one has chosen, the n-th time that any file is opened: none, one and some steps into a run."""
    kills = [killed(arguments("distill", run), "builtins:open", opened, True) for opened in (20, 35, 70, 55)]
    assert any(kills)
    check_equal(distilled(run), whole)


def test_interrupt_and_resume(
    tmp_path: Path, interrupted: Settings, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [row["step"] for row in log(tmp_path / "run")] == [0, 1, 2, 3]
    torch.rand(5)  # a new process starts with other random numbers
    assert cli.main(arguments("distill", interrupted)) == 0
    assert "resumed" in capsys.readouterr().err
    check_equal(tmp_path / "run", whole)


SHORT: Settings = {"optim__steps": 4, "eval__every": 0}
OTHERS: dict[str, Settings] = {
    "lora": {"student__lora__rank": 2},
    "bfloat16": {"student__dtype": "bfloat16"},
    "reverse_kl": {"loss__objective": "reverse_kl", **SHORT},
    "top_k": {"loss__objective": "top_k", "loss__top_k": 5, **SHORT},
    "sampled_tail": {"loss__objective": "top_k", "loss__top_k": 3, "loss__top_k_tail": "sampled", **SHORT},
    "top_k_of_both": {"loss__objective": "top_k", "loss__top_k": 5, "loss__top_k_of": "both", **SHORT},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_resume_of_other_students_and_objectives(
    tmp_path: Path, dropout: Path, monkeypatch: pytest.MonkeyPatch, options: Settings
) -> None:
    one = distilled(settings(dropout, tmp_path / "whole", **options))
    run = settings(dropout, tmp_path / "run", **options)
    interrupt(monkeypatch, run, 3)
    if "student__lora__rank" in options:  # the frozen base is not written again and again
        (weights,) = (tmp_path / "run" / "checkpoints").glob("*/model.safetensors")
        assert all(".lora_" in name for name in load_file(weights))
    check_equal(distilled(run), one)


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, interrupted: Settings, whole: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "run" / name, "ab") as file:
            file.write('{"step": 4, "text": "dé'.encode()[:-1])  # in the middle of a character too
    check_equal(distilled(interrupted), whole)


def test_leftovers_of_a_checkpoint_are_cleared(
    tmp_path: Path, run: Settings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run["checkpoint.keep"] = 3
    interrupt(monkeypatch, run, 3)
    incomplete = tmp_path / "run" / "checkpoints" / ".incomplete"
    incomplete.mkdir()
    (incomplete / "stale.bin").write_bytes(b"stale")
    check_equal(distilled(run), whole)
    assert not incomplete.exists()
    assert not list((tmp_path / "run" / "checkpoints").rglob("stale.bin"))


@pytest.mark.parametrize(
    ("every", "keep", "wanted"), [(2, 2, [4, 6]), (4, 3, [4, 6]), (0, 1, [6]), (1, 1, [6])], ids=str
)
def test_checkpoints_kept(tmp_path: Path, dropout: Path, every: int, keep: int, wanted: list[int]) -> None:
    run = settings(dropout, tmp_path / "run", checkpoint__every=every, checkpoint__keep=keep, eval__every=0)
    path = distilled(run)
    names = sorted(entry.name for entry in (path / "checkpoints").iterdir())
    assert names == [f"step-{step:06d}" for step in wanted]


def test_a_finished_run_is_left_as_it_is(dropout: Path, unchanged: Path, steps_run: list[int]) -> None:
    distilled(settings(dropout, unchanged))
    assert steps_run == []


def test_a_run_may_be_moved(tmp_path: Path, dropout: Path, interrupted: Settings, whole: Path) -> None:
    (tmp_path / "run").rename(tmp_path / "there")
    check_equal(distilled(settings(dropout, tmp_path / "there")), whole)


def test_another_config_is_refused_with_both_values(
    dropout: Path, unchanged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(dropout, unchanged, optim__lr=0.5, optim__betas="[0.8, 0.95]", student__lora__rank=4)
    changes = "optim.lr was 0.01 and is 0.5", "optim.betas was [0.9, 0.95] and is [0.8, 0.95]"
    error = refusal(capsys, "distill", run, str(unchanged), *changes, "student.lora.rank was 0 and is 4")
    assert "steps was" not in error


@pytest.mark.parametrize("kind", ["folder-of-other-things", "file"])
def test_what_is_no_run_is_left_alone(
    tmp_path: Path, dropout: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "thesis"
    if kind == "file":
        path.write_text("chapter one")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("chapter one")
    refusal(capsys, "distill", settings(dropout, path), f"{path} exists and is not a run folder")
    assert list(snapshot(tmp_path).values()) == [b"chapter one"]


def test_an_empty_folder_is_taken(tmp_path: Path, dropout: Path) -> None:
    check_run_folder(config("distill", settings(dropout, tmp_path)))


def test_one_process_at_a_time(dropout: Path, unchanged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = settings(dropout, unchanged)
    with RunFolder(config("distill", run)):
        refusal(capsys, "distill", run, f"another process is writing to {unchanged}")


def test_the_lock_is_released_when_a_run_fails(run: Settings, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(OnPolicy, "samples", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distilled(run)
    check_equal(distilled(run), whole)


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb\x0c\x1c", 'é🙂\n\r\t"\\'], ids=ascii)
def test_logs_hold_any_text(run: Settings, text: str) -> None:
    """Some characters end a line for Python's splitlines, and not for JSONL."""
    rows = [{"step": step, "text": text} for step in (1, 2, 3)]
    with RunFolder(config("distill", run)) as folder:
        folder.log("samples.jsonl", rows)
        folder.rewind(2)
        assert read_jsonl(folder.path / "samples.jsonl") == read_log(folder.path / "samples.jsonl") == rows[:2]


def test_any_prefix_of_a_log_can_be_read(tmp_path: Path) -> None:
    rows = [{"step": step, "text": "dé🙂"} for step in range(3)]
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    content, ends = b"".join(lines), list(itertools.accumulate(len(line) - 1 for line in lines))
    for length in range(len(content) + 1):
        (tmp_path / "log").write_bytes(content[:length])
        complete = sum(length >= end + index for index, end in enumerate(ends))  # the newline itself may be missing
        assert read_log(tmp_path / "log") == rows[:complete]


def test_a_checkpoint_of_another_shape_is_an_error(tmp_path: Path, run: Settings) -> None:
    """A model folder that was exchanged under the run: never a silent start from other weights."""
    run["student.path"] = save_model(tmp_path / "student")
    distilled(run)
    save_model(tmp_path / "student", width=24)
    with pytest.raises((RuntimeError, ConfigError)):
        distilled(run)


CHAINS: dict[str, Settings] = {
    "full": {},
    "lora-partial-sparse": {
        "student__lora__rank": 2,
        "sampling__tokens_per_step": 3,
        "loss__backward": "sparse",
        "checkpoint__every": 3,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("options", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_until_it_is_done(tmp_path: Path, dropout: Path, options: Settings, seed: int) -> None:
    one = distilled(settings(dropout, tmp_path / "whole", **options))
    command_line, rng, kills = (
        arguments("distill", settings(dropout, tmp_path / "run", **options)),
        random.Random(seed),
        0,
    )
    while kills < 12:
        process = CONTEXT.Process(target=cli.main, args=(command_line,))
        process.start()
        process.join(rng.uniform(0.5, 4))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert kills > 0
    check_equal(distilled(settings(dropout, tmp_path / "run", **options)), one)
