"""Distributions of a student and a teacher with another tokenizer, in runs of tiny models, against all logits at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from run_cases import check_equal, distilled, interrupt, run
from run_settings import arguments, distillation
from segment_cases import (
    OWN,
    alone_and_together,
    both_kinds_of_teachers,
    completion,
    segments,
    strangers,
    teacher_logprobs,
    words,
)
from server_cases import served
from stub_server import serving
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkl import cli, reference

PAIRS = [("characters", "pairs"), ("pairs", "characters")]
OBJECTIVES: dict[str, dict[str, object]] = {
    "reverse_kl": {},
    "forward_kl": {},
    "jsd": {"loss__jsd_beta": 0.3},
    "skewed_reverse_kl": {},
    "skewed_forward_kl": {},
    "total_variation": {},
    "top_k": {"loss__top_k": 5},
}
QUICK = ("reverse_kl", "forward_kl", "top_k")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
COMPARED: dict[str, object] = {**OWN, "loss__objective": "reverse_kl"}


@pytest.fixture(scope="module", params=PAIRS, ids="-from-".join)
def strange(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strangers(tmp_path_factory.mktemp("strangers"), *request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strangers(tmp_path_factory.mktemp("pair"), "characters", "pairs")


def pairs_of(models: Path) -> tuple[Tensor, Tensor]:
    """Ids of tokens that are spelled alike."""
    ours, theirs = (AutoTokenizer.from_pretrained(models / who).get_vocab() for who in ("student", "teacher"))
    found = [(token, theirs[text]) for text, token in ours.items() if text in theirs]
    student, teacher = zip(*found, strict=True)
    return torch.tensor(student), torch.tensor(teacher)


class Rows(NamedTuple):
    """Where both begin a token."""

    p: Tensor  # [m, V] logits
    q: Tensor  # [m, V_t]
    compared: int
    counted: int


def logits_of(folder: Path, ids: list[int], prompt: int) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0]
    return found[prompt - 1 :]


def rows_of(models: Path, samples: list[dict[str, Any]]) -> Rows:
    ours, theirs, counted = list[Tensor](), list[Tensor](), 0
    for sample in samples:
        own, read = sample["ids"], sample["teacher_prompt"] + sample["teacher_completion"]
        parts = segments(completion(sample, "tokens"), sample["teacher_tokens"])
        p = logits_of(models / "student", own, len(own) - sample["completion_length"])
        q = logits_of(models / "teacher", read, len(sample["teacher_prompt"]))
        ours.append(p[[part.ours[0] for part in parts]])
        theirs.append(q[[part.theirs[0] for part in parts]])
        counted += sample["completion_length"]
    p, q = torch.cat(ours), torch.cat(theirs)
    return Rows(p, q, len(p), counted)


def wanted(name: str, rows: Rows, ids: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over the rows."""
    p, q = reference.common_vocabulary(rows.p.float(), rows.q.float(), *ids)  # in whose eps a teacher has a rest
    if name != "top_k":
        options = {"jsd": (0.3,), "skewed_reverse_kl": (0.1,), "skewed_forward_kl": (0.1,)}.get(name, ())
        return getattr(reference, name)(p, q, *options).mean()
    log_q = torch.log_softmax(rows.q, -1)
    student_of = dict(zip(ids[1].tolist(), ids[0].tolist(), strict=True))
    values = []
    for row, of_student in zip(log_q, rows.p, strict=True):
        listed = [token for token in row.topk(5).indices.tolist() if token in student_of]
        if listed:
            own = torch.tensor([[student_of[token] for token in listed]])
            values.append(reference.top_k_kl(of_student[None], own, row[listed][None])[0])
    return torch.stack(values).mean()


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_over_the_tokens_of_both(strange: Path, tmp_path: Path, name: str) -> None:
    options = {**OWN, **OBJECTIVES[name], "loss__objective": name, "batch__max_tokens": 60}
    done = run(tmp_path / "run", strange, **options, optim__steps=1)
    (row,), rows, ids = done.metrics, rows_of(strange, done.samples), pairs_of(strange)
    metric = "top_k_kl" if name == "top_k" else name
    assert row[f"policy/{metric}_mean"] == pytest.approx(wanted(name, rows, ids).item(), rel=1e-4)
    assert row["loss"] == pytest.approx(row[f"policy/{metric}_mean"], rel=1e-5)
    for sample in done.samples:
        found = sample["teacher_completion_logprobs"]
        assert found == pytest.approx(teacher_logprobs(strange / "teacher", sample), abs=1e-5)
    if name != "top_k":
        assert row["alignment/compared_fraction"] == rows.compared / rows.counted
        for which, logits, own in (("", rows.p, ids[0]), ("teacher_", rows.q, ids[1])):
            rest = 1.0 - torch.softmax(logits, -1)[:, own].sum(1).mean().item()
            assert row[f"policy/{which}rest_mass"] == pytest.approx(rest, rel=1e-4, abs=1e-6)
        assert ("guards/rest" in row) == (max(row["policy/teacher_rest_mass"], row["policy/rest_mass"]) > 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_with_one_tokenizer_it_is_the_plain_objective(tmp_path: Path, name: str) -> None:
    models = strangers(tmp_path, "pairs", "pairs")
    options = {**OBJECTIVES[name], "loss__objective": name, "optim__steps": 2}
    plain, own = (run(tmp_path / who, models, **options, **more) for who, more in (("plain", {}), ("own", OWN)))
    for ours, theirs in zip(own.metrics, plain.metrics, strict=True):
        for metric in (key for key in theirs if key.startswith("policy/") and key in ours):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-3, abs=1e-6), metric
        assert ours["alignment/compared_fraction"] == 1
    weights = plain.weights()
    for key, value in own.weights().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=2e-5)


def test_a_server_gives_lists_of_its_own_tokens(pair: Path, tmp_path: Path) -> None:
    options = {"loss__objective": "top_k", "loss__top_k": 5, "optim__steps": 2}
    local = run(tmp_path / "local", pair, **OWN, **options)
    with serving(pair / "teacher", words("pairs")) as stub:
        stub.told["/v1/models"] = {"data": [{"id": "stub", "max_model_len": stub.context}]}
        own = {"teacher__tokenizer": f"own:{pair / 'teacher'}"}
        there = run(tmp_path / "served", pair, **own, **options, **served("teacher", stub))
    for ours, theirs in zip(there.metrics, local.metrics, strict=True):
        assert ours["policy/top_k_kl_mean"] == pytest.approx(theirs["policy/top_k_kl_mean"], rel=1e-4)
        assert ours["alignment/compared_fraction"] == theirs["alignment/compared_fraction"] > 0.3


def test_a_cache_keeps_lists_in_the_teachers_ids(pair: Path, tmp_path: Path) -> None:
    options = {**OWN, "loss__objective": "top_k", "teacher__cache": tmp_path / "cache", "optim__steps": 1}
    first, again = (run(tmp_path / name, pair, **options) for name in ("first", "again"))
    assert (first.metrics[0]["teacher_cache/hits"], again.metrics[0]["teacher_cache/misses"]) == (0, 0)
    assert first.metrics[0]["policy/top_k_kl_mean"] == again.metrics[0]["policy/top_k_kl_mean"]


WAYS: dict[str, dict[str, object]] = {
    "given": {"sampling__on_policy_fraction": 0.5},
    "in-portions": {"sampling__tokens_per_step": 3},
    "turns": {"environment__name": "class:nods.Nods", "environment__trust": "true", "environment__role": "user"},
    "weighed": {"loss__weights": "[skip_first:2]"},
}


@pytest.mark.parametrize("name", ["reverse_kl", "top_k"])
@pytest.mark.parametrize("way", WAYS)
def test_completions_of_several_parts(pair: Path, tmp_path: Path, way: str, name: str) -> None:
    done = run(tmp_path / "run", pair, **OWN, **WAYS[way], loss__objective=name, optim__steps=2)
    for row in done.metrics:
        assert 0 < row["alignment/compared_fraction"] < 1
        assert row["optim/grad_norm"] > 0


@pytest.mark.parametrize("name", ["reverse_kl", pytest.param("top_k", marks=pytest.mark.slow)])
def test_it_goes_on_in_the_middle(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = {**OWN, "loss__objective": name, "checkpoint__every": 2, "optim__steps": 4}
    whole = distilled(distillation(tmp_path / "whole", pair, **options))
    settings = distillation(tmp_path / "run", pair, **options)
    interrupt(monkeypatch, settings, 3)
    check_equal(distilled(settings), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jsd", "top_k"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(tmp_path: Path, pair: Path, fsdp: bool, name: str) -> None:
    alone_and_together(tmp_path, pair, fsdp, **OWN, loss__objective=name)


def test_a_mixture_of_both_kinds_of_teachers(pair: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "run", pair, **both_kinds_of_teachers(pair, tmp_path), loss__objective="jsd")
    assert {"teacher_kl/own", "teacher_kl/told", "teacher_kl/kin"} < done.metrics[0].keys()


def test_a_dry_run_counts_what_is_in_common(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = distillation(tmp_path / "run", pair, **COMPARED)
    assert cli.main([*arguments("distill", settings), "--dry-run"]) == 0
    said = capsys.readouterr().out
    count = len(words("characters"))
    assert f"in common   {count} tokens; distributions are compared at 21 of 29 tokens" in said
