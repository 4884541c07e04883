"""Distillations whose teacher has its own tokenizer, end to end on tiny models, against plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_cases import check_equal, check_same_weights, distilled, interrupt, log, run
from run_settings import arguments, distillation
from segment_cases import (
    OF_OWN,
    OWN,
    alone_and_together,
    answered,
    both_kinds_of_teachers,
    completion,
    gaps,
    segments,
    strangers,
    teacher_logprobs,
    with_earlier,
    words,
)
from server_cases import served
from stub_server import serving
from stub_vllm import StubVllm
from tiny_data import read_jsonl
from tiny_models import save_model

from fastkl import cli
from fastkl.trainer.runs.report.samples import page_samples

PAIRS = [("characters", "pairs"), ("pairs", "characters")]


@pytest.fixture(scope="module", params=PAIRS, ids="-from-".join)
def strange(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strangers(tmp_path_factory.mktemp("strangers"), *request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that writes characters, a teacher that reads two at a time."""
    return strangers(tmp_path_factory.mktemp("pair"), "characters", "pairs")


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in names and not k.startswith("alignment/")} for row in rows]


def check_sample(sample: dict[str, Any], teacher: Path) -> int:
    """Its scores are those of a plain forward pass, and its tokens answer for their segments. How many are no pairs?"""
    found = sample["teacher_completion_logprobs"]
    assert found == pytest.approx(teacher_logprobs(teacher, sample), abs=1e-5)
    ours, shared = completion(sample, "tokens"), completion(sample, "teacher_logprobs")
    assert "".join(sample["teacher_tokens"]) == "".join(ours)
    assert completion(sample, "advantages") == pytest.approx([-d for d in answered(sample, teacher)], abs=1e-5)
    parts = segments(ours, sample["teacher_tokens"])
    for part in parts:
        assert sum(shared[i] for i in part.ours) == pytest.approx(sum(found[j] for j in part.theirs), abs=1e-5)
    return sum(len(part.ours) > 1 or len(part.theirs) > 1 for part in parts)


@pytest.mark.parametrize("most", [30, 4000], ids=["many-batches", "one-batch"])
def test_every_token_answers_for_its_segment(strange: Path, tmp_path: Path, most: int) -> None:
    done = run(tmp_path / "run", strange, **OWN, optim__steps=2, batch__max_tokens=most)
    assert sum(check_sample(sample, strange / "teacher") for sample in done.samples) > 2
    for row in done.metrics:
        step = [sample for sample in done.samples if sample["step"] == row["step"]]
        ours, theirs = (sum(sum(s[f"{who}_logprobs"]) for s in step) for who in ("sampler", "teacher_completion"))
        assert row["teacher_kl"] == pytest.approx((ours - theirs) / sum(s["completion_length"] for s in step), abs=1e-5)
        assert row["alignment/aligned_fraction"] == 1


@pytest.mark.parametrize("kind", ["characters", "pairs"])
def test_one_tokenizer_changes_no_bit(tmp_path: Path, kind: str) -> None:
    """Not even where the student writes what the tokenizer would have written with other tokens."""
    models = strangers(tmp_path, kind, kind)
    options = {"loss__discount": 0.5, "loss__baseline": "mean", "optim__steps": 2, "batch__max_tokens": 40}
    plain = distilled(distillation(tmp_path / "plain", models, **options))
    own = distilled(distillation(tmp_path / "own", models, **options, **OWN))
    assert without(log(own)) == log(plain)
    ours, theirs = (read_jsonl(path / "samples.jsonl") for path in (own, plain))
    assert without(ours, *OF_OWN) == without(theirs, *OF_OWN)
    check_same_weights(own, plain)
    if kind == "pairs":
        assert any(words(kind)(s["text"])["input_ids"] != s["ids"] for s in ours)


def test_a_server_is_sent_its_own_tokens(pair: Path, tmp_path: Path) -> None:
    local = run(tmp_path / "local", pair, **OWN, optim__steps=2)
    own = {"teacher__tokenizer": f"own:{pair / 'teacher'}", "optim__steps": 2}
    with serving(pair / "teacher", words("pairs")) as stub:
        stub.context = 97  # a token is generated too
        stub.told["/v1/models"] = {"data": [{"id": "stub", "max_model_len": stub.context}]}
        there = run(tmp_path / "served", pair, **own, **served("teacher", stub))
    for ours, theirs in zip(there.samples, local.samples, strict=True):
        assert ours["teacher_completion"] == theirs["teacher_completion"]
        assert ours["advantages"] == pytest.approx(theirs["advantages"], abs=1e-4)
        assert ours["teacher_completion_ranks"] == theirs["teacher_completion_ranks"] != []


@pytest.mark.parametrize("told", [False, True], ids=["unknown", "told"])
def test_a_server_is_sent_no_more_than_it_reads(tmp_path: Path, told: bool) -> None:
    """What it tells of its context, or else as much as it was asked for at the start: a prompt and as many tokens."""
    models = strangers(tmp_path, "pairs", "characters")
    own = {"teacher__tokenizer": f"own:{models / 'teacher'}", "optim__steps": 1, "sampling__max_new_tokens": 12}
    with serving(models / "teacher", words("characters")) as stub:
        if told:
            stub.told["/v1/models"] = {"data": [{"id": "stub", "max_model_len": stub.context}]}
        done = run(tmp_path / "run", models, **own, **served("teacher", stub))
    longest = max(len(sample["teacher_prompt"]) + len(sample["teacher_completion"]) for sample in done.samples)
    assert (longest == 9 + 12) == (not told)
    assert (done.metrics[0]["alignment/aligned_fraction"] < 1) == (not told)


def test_what_does_not_fit_into_the_teachers_context_is_not_judged(tmp_path: Path) -> None:
    models = strangers(tmp_path, "pairs", "characters")
    save_model(models / "teacher", words("characters"), seed=1, max_position_embeddings=24)
    done = run(tmp_path / "run", models, **OWN, optim__steps=1, sampling__max_new_tokens=14)
    assert done.metrics[0]["alignment/aligned_fraction"] < 1
    cut = 0
    for sample in done.samples:
        written, read = "".join(completion(sample, "tokens")), "".join(sample["teacher_tokens"])
        assert len(sample["teacher_prompt"] + sample["teacher_completion"]) <= 24
        assert written.startswith(read)
        known = [number > 0 for number in completion(sample, "segments")]
        own = [token for token, counts in zip(completion(sample, "tokens"), known, strict=True) if counts]
        assert read.startswith("".join(own))
        assert sample["teacher_completion_logprobs"][: len("".join(own))] == pytest.approx(
            teacher_logprobs(models / "teacher", sample)[: len("".join(own))], abs=1e-5
        )
        after = [a for a, counts in zip(completion(sample, "advantages"), known, strict=True) if not counts]
        assert after == [0.0] * len(after)
        cut += len(after)
    assert cut > 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"loss__discount": 0.5}, id="plain"),
        pytest.param({"sampling__tokens_per_step": 3}, id="in-portions", marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_in_the_middle(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    options = {**OWN, **options, "checkpoint__every": 2, "optim__steps": 4}
    whole = distilled(distillation(tmp_path / "whole", pair, **options))
    settings = distillation(tmp_path / "run", pair, **options)
    interrupt(monkeypatch, settings, 3)
    check_equal(distilled(settings), whole)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(tmp_path: Path, pair: Path, fsdp: bool) -> None:
    options: dict[str, object] = {"loss__baseline": "mean", "loss__discount": 0.5, **OWN}
    runs = alone_and_together(tmp_path, pair, fsdp, **options)
    theirs, ours = (read_jsonl(path / "samples.jsonl") for path in runs)
    for name in ("teacher_completion", "segments", "teacher_segments"):
        assert [sample[name] for sample in ours] == [sample[name] for sample in theirs]


def test_a_cache_knows_the_teachers_tokens(pair: Path, tmp_path: Path) -> None:
    options = {**OWN, "teacher__cache": tmp_path / "cache", "optim__steps": 1}
    first, again = (run(tmp_path / name, pair, **options) for name in ("first", "again"))
    assert (first.metrics[0]["teacher_cache/hits"], again.metrics[0]["teacher_cache/misses"]) == (0, 0)
    for ours, theirs in zip(again.samples, first.samples, strict=True):
        assert ours == theirs


def test_a_mixture_of_both_kinds_of_teachers(pair: Path, folder: Path, tmp_path: Path) -> None:
    """And two data sets of one teacher, which is loaded once."""
    done = run(tmp_path / "run", pair, **both_kinds_of_teachers(pair, tmp_path), loss__baseline="mean")
    assert {sample["dataset"] for sample in done.samples} == {"own", "told", "kin"}
    for sample in done.samples:
        if sample["dataset"] == "kin":
            assert "segments" not in sample
            assert sample["teacher_prompt"] is None
            continue
        assert sample["teacher_text"].startswith("<s>in words<u>") == (sample["dataset"] == "told")
        wanted = teacher_logprobs(pair / "teacher", sample)
        assert sample["teacher_completion_logprobs"] == pytest.approx(wanted, abs=1e-5)
        assert sample["plain_logprobs"] == []
    assert {"teacher_kl/own", "teacher_kl/told", "teacher_kl/kin"} < done.metrics[0].keys()


WAYS: dict[str, dict[str, object]] = {
    "given": {"sampling__on_policy_fraction": 0.5},
    "in-portions": {"sampling__tokens_per_step": 3},
    "replies": {"environment__name": "class:nods.Nods", "environment__trust": "true"},
    "turns": {"environment__name": "class:nods.Nods", "environment__trust": "true", "environment__role": "user"},
}


@pytest.mark.parametrize("way", WAYS)
def test_completions_of_several_parts(pair: Path, tmp_path: Path, way: str) -> None:
    """What does not count is read by the teacher and judged by nobody; nor is what shares a segment with it."""
    done = run(tmp_path / "run", pair, **OWN, **WAYS[way], optim__steps=2)
    mixed = 0
    for sample in done.samples:
        wanted, found = teacher_logprobs(pair / "teacher", sample), sample["teacher_completion_logprobs"]
        ours, advantages = completion(sample, "tokens"), completion(sample, "advantages")
        counted, own = completion(sample, "loss_mask"), completion(sample, "sampler_logprobs")
        d = [0.0] * len(ours)
        for part in segments(ours, sample["teacher_tokens"]):
            known = {counted[i] for i in part.ours}
            mixed += len(known) > 1
            judged = known == {True}
            scores = [wanted[j] if judged else 0.0 for j in part.theirs]
            assert [found[j] for j in part.theirs] == pytest.approx(scores, abs=1e-5)
            if judged and not sample["given"]:
                for i in part.ours:
                    d[i] = sum(own[i] for i in part.ours) - sum(scores)
        if not sample["given"]:
            places = [i for i, number in enumerate(completion(sample, "segments")) if number and counted[i]]
            answers = with_earlier(sample, d, pair / "teacher")
            assert [advantages[i] for i in places] == pytest.approx([-answers[i] for i in places], abs=1e-5)
            assert not any(advantages[i] for i in range(len(ours)) if i not in places)
    assert any(sample["given"] for sample in done.samples) == (way == "given")
    assert way != "in-portions" or mixed > 0


@pytest.mark.slow
def test_rollouts_ahead_ask_about_the_teachers_tokens(pair: Path, tmp_path: Path) -> None:
    """Early, by threads; the scores are those that are asked for late."""
    own = {"teacher__tokenizer": f"own:{pair / 'teacher'}", "optim__steps": 3}
    runs = []
    for name, early in (("early", True), ("late", False)):
        with (
            serving(pair / "teacher", words("pairs")) as teacher,
            serving(pair / "student", words("characters"), kind=StubVllm) as student,
        ):
            cache = {} if early else {"teacher__cache": tmp_path / "cache"}  # which nobody asks early
            options = {**served("teacher", teacher), **served("sampling", student), **own, **cache}
            runs.append(run(tmp_path / name, pair, **options, sampling__steps_ahead=1))
            asked = [tuple(ids) for body in teacher.bodies for ids in body.get("prompt", [])]
        for sample in runs[-1].samples:
            assert asked.count(tuple(sample["teacher_prompt"] + sample["teacher_completion"])) >= 1
    assert [s["advantages"] for s in runs[0].samples] == [s["advantages"] for s in runs[1].samples]


def test_a_dry_run_shows_ten_texts(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answers of the rows, aligned; and what the teacher reads of the first prompt."""
    options = {**OWN, "teacher__context__system": "in words"}
    assert cli.main([*arguments("distill", distillation(tmp_path / "run", pair, **options)), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "<s>in words<u>1+1=<a>" in said
    assert "0.60 in completions, as in texts of the data" in said
    found = said[said.index("alignment ") :].splitlines()
    assert found[0].endswith(
        "of 10 texts of data: 29 of 29 tokens are in 21 segments of 0.9 bytes, the longest of 2; the teacher has 21 tokens "
        "in them"
    )
    assert len(found) == 1 + 3 * 10
    assert found[-3].endswith("sums.jsonl:10")
    assert found[-2:] == ["  student 1·1│0│<eos>", "  teacher 11│0│<eos>"]
    assert not (tmp_path / "run").exists()


def test_the_page_shows_the_tokens_of_both(pair: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "run", pair, **OWN, optim__steps=1)
    (shown, *_) = page_samples(done.folder, 10**6)["shown"]
    sample = done.samples[shown["number"]]
    own, d = shown["own"], gaps(sample)
    assert own["of"] == completion(sample, "segments")
    for part in segments(completion(sample, "tokens"), sample["teacher_tokens"]):
        segment = own["segments"][str(own["of"][part.ours[0]])]
        assert [text for text, _ in segment["student"]] == [completion(sample, "tokens")[i] for i in part.ours]
        assert [text for text, _ in segment["teacher"]] == [sample["teacher_tokens"][j] for j in part.theirs]
        assert segment["kl"] == pytest.approx(d[part.ours[0]], abs=1e-3)
        assert segment["share"] == pytest.approx(segment["kl"] / len(part.ours), abs=1e-3)
    assert shown["read"] == sample["teacher_text"]
