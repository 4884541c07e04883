"""`fastkl distill` and `fastkl score` with a teacher behind HTTP: the same runs as with the model here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from run_cases import check_equal, check_scores, distilled, log, refusal
from run_settings import arguments, distillation, evaluated
from server_cases import served
from stub_server import StubServer, serving
from tiny_models import CHAT_TEMPLATE, llama, tokenizer

from fastkl import cli

STEPS = 4
KEY = "sk-very-secret"


@pytest.fixture
def stub(dropout: Path) -> Iterator[StubServer]:
    with serving(dropout / "teacher") as server:
        yield server


def settings(dropout: Path, run: Path, stub: StubServer, **overrides: object) -> dict[str, object]:
    small = {"optim__steps": STEPS, "checkpoint__every": 3, **evaluated(dropout), **overrides}
    return distillation(run, dropout, **small, **served("teacher", stub, sequences_per_request=2))


@pytest.fixture(scope="module")
def whole(dropout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose server was always there."""
    with serving(dropout / "teacher") as server:
        return distilled(settings(dropout, tmp_path_factory.mktemp("run") / "whole", server))


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
def test_a_run_equals_one_with_the_teacher_here(tmp_path: Path, dropout: Path, stub: StubServer, api: str) -> None:
    ours = log(distilled(settings(dropout, tmp_path / "served", stub) | {"teacher.server.api": api}))
    theirs = log(distilled(distillation(tmp_path / "local", dropout, optim__steps=STEPS)))
    for a, b in zip([row for row in ours if row["step"]], theirs, strict=True):
        assert a["teacher_kl"] == pytest.approx(b["teacher_kl"], abs=1e-4)
        assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-3)


@pytest.mark.parametrize("answered", [0, 2, 5, 10], ids=lambda count: f"gone-after-{count}")
def test_a_server_that_goes_away(
    tmp_path: Path,
    dropout: Path,
    whole: Path,
    stub: StubServer,
    answered: int,
    steps_run: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three requests a step. The steps that were done are kept, and the same command goes on with the next."""
    run = settings(dropout, tmp_path / "run", stub, checkpoint__every=0)
    checks = 3  # requests before the first step
    stub.down_after = checks + answered
    message = f"the teacher's server gave no answer at {stub.url}/completions in 2 attempts"
    refusal(capsys, "distill", run, message, "give the same command again")
    done = answered // 3
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert [row["step"] for row in log(tmp_path / "run")] == list(range(done + 1))

    assert cli.main(arguments("distill", run)) == 2  # still away: nothing is lost
    stub.down_after = None
    steps_run.clear()
    check_equal(distilled(run), whole)
    assert steps_run == list(range(done, STEPS))


def test_a_server_may_come_back_elsewhere(
    tmp_path: Path, dropout: Path, whole: Path, stub: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.down_after = 7
    assert cli.main(arguments("distill", settings(dropout, tmp_path / "run", stub))) == 2
    with serving(dropout / "teacher") as other:
        moved = settings(dropout, tmp_path / "run", other)
        other_model = moved | {"teacher.server.model": "other"}
        refusal(capsys, "distill", other_model, "teacher.server.model was 'stub' and is 'other'")
        check_equal(distilled(moved | {"teacher.server.concurrency": 1}), whole)


def test_a_server_that_comes_back_with_another_model(
    tmp_path: Path,
    dropout: Path,
    whole: Path,
    stub: StubServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step that it scored is lost, and no other."""
    answer, own, requests = stub.answer, stub.model, iter(range(100))
    other = llama(own.config.vocab_size, seed=9)

    def changing(path: str, body: dict[str, object]) -> tuple[int, object]:
        if path == "/v1/completions" and next(requests) == 3 + 2 * 3:  # of the third step
            stub.model, stub.troubles = other, ["reset"]
        return answer(path, body)

    monkeypatch.setattr(stub, "answer", changing)
    run = settings(dropout, tmp_path / "run", stub, checkpoint__every=0) | {"teacher.server.concurrency": 1}
    refusal(capsys, "distill", run, f"server at {stub.url} is not what it was when the run began", "the run goes on")
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    refusal(capsys, "distill", run, f"server at {stub.url} is not what it was when the run began")  # still the other
    stub.model = own
    check_equal(distilled(run | {"teacher.server.recheck_every": 1}), whole)


def test_a_server_that_changes_after_the_last_check(
    tmp_path: Path, dropout: Path, stub: StubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last step of a run, resumed or not, that is shorter than `recheck_every`."""
    answer, own = stub.answer, stub.model
    other, left = llama(own.config.vocab_size, seed=9), [3 + 3]  # before the run, and in the first step

    def changing(path: str, body: dict[str, object]) -> tuple[int, object]:
        left[0] -= path == "/v1/completions"
        if left[0] < 0:
            stub.model = other
        return answer(path, body)

    monkeypatch.setattr(stub, "answer", changing)
    run = settings(dropout, tmp_path / "run", stub, optim__steps=2)
    message = f"server at {stub.url} is not what it was when the run began"
    refusal(capsys, "distill", run, message, "the run goes on")
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    stub.model, left[0] = own, 3 + 1  # and for the comparison with the run's beginning
    refusal(capsys, "distill", run, message)
    stub.model, left[0] = own, 100
    assert log(distilled(run))[-1]["step"] == 2


def test_a_server_that_changes_while_completions_are_scored(
    tmp_path: Path, dropout: Path, stub: StubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, other, asked = stub.answer, llama(stub.model.config.vocab_size, seed=9), iter(range(100))

    def changing(path: str, body: dict[str, object]) -> tuple[int, object]:
        if path == "/v1/completions" and next(asked) == 3:
            stub.model = other
        return answer(path, body)

    monkeypatch.setattr(stub, "answer", changing)
    server = {"model.server.url": stub.url, "model.server.model": "stub", "model.tokenizer": dropout / "teacher"}
    given = {"data.path": dropout / "sums.jsonl", "output": tmp_path / "scores.jsonl"}
    refusal(capsys, "score", server | given, "is not what it was when the run began")


def test_the_key_is_written_nowhere(
    tmp_path: Path, dropout: Path, stub: StubServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    run = settings(dropout, tmp_path / "run", stub, optim__steps=1) | {"teacher.server.api_key_env": "TEACHER_KEY"}
    assert cli.main(arguments("distill", run)) == 0
    assert set(stub.authorizations) == {f"Bearer {KEY}"}
    assert KEY not in "".join(capfd.readouterr())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


UNFIT = {
    "ignored": ({"defect": "ignored"}, {}, "gives no log-probs of given tokens"),
    "shifted": ({"defect": "shifted"}, {}, "shifted by one"),
    "temperature": ({}, {"sampling.temperature": 0.7}, "the temperature is 0.7"),
    "context": ({"context": 32}, {"sampling.max_new_tokens": 40}, "sampling.max_new_tokens"),
    "model": ({}, {"teacher.server.model": "other"}, "The model other does not exist"),
}


@pytest.mark.parametrize(("server", "extra", "message"), UNFIT.values(), ids=UNFIT)
def test_refused_before_the_run_folder_exists(
    tmp_path: Path,
    dropout: Path,
    stub: StubServer,
    server: dict[str, object],
    extra: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vars(stub).update(server)
    error = refusal(capsys, "distill", settings(dropout, tmp_path / "run", stub) | extra, message)
    assert len(error.strip().splitlines()) == 3  # two say what was done before
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_named_is_compared(
    tmp_path: Path, dropout: Path, stub: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder needs no model; a chat template in it counts as the teacher's."""
    words = tokenizer()
    words.chat_template = CHAT_TEMPLATE.replace("<a>", "<a> ")
    words.save_pretrained(tmp_path / "words")
    run = settings(dropout, tmp_path / "run", stub, optim__steps=1) | {"teacher.tokenizer": tmp_path / "words"}
    refusal(capsys, "distill", run, "chat templates of student and teacher differ")
    tokenizer().save_pretrained(tmp_path / "words")
    distilled(run)


def test_scores_of_a_server(tmp_path: Path, dropout: Path, stub: StubServer) -> None:
    server = {"model.server.url": stub.url, "model.server.model": "stub", "model.tokenizer": dropout / "teacher"}
    check_scores(tmp_path, dropout / "sums.jsonl", {"model.path": dropout / "teacher"}, server, 1e-4)
