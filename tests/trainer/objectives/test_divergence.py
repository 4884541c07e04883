"""Divergences as objectives of a distillation: each step against the same step written out with all the logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_cases import WORDS, Pair, make_pair
from run_cases import check_equal, first_moments, interrupt
from run_settings import config, distillation
from stub_server import serving
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import llama, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl.loss import linear_top_k
from fastkl.trainer.data.samples import UNKNOWN
from fastkl.trainer.distill import distill

K = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("models")
    return Pair(
        save_model(folder / "student"),
        save_model(folder / "teacher", seed=1, width=24, tie_word_embeddings=False),
        write_jsonl(folder / "sums.jsonl", sums()),
    )


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("padded"))


def run(folder: Path, models: Pair, **options: object) -> Path:
    return distill(config("distill", distillation(folder, *models, **options))).path


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixed(share: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    return (share * log_p.exp() + (1 - share) * log_q.exp()).log()


def top_k(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Reverse, the rest as one outcome."""
    q, ids = log_q.topk(K, -1)
    p = log_p.gather(-1, ids)
    rest_p, rest_q = (torch.log1p(-listed.exp().sum(-1, keepdim=True)) for listed in (p, q))
    return kl(torch.cat([p, rest_p], -1), torch.cat([q, rest_q], -1))


# Objective and options of a run, and the same per token, from log-probs over the vocabulary.
Formula = Callable[[Tensor, Tensor], Tensor]
CASES: dict[str, tuple[dict[str, object], Formula]] = {
    "reverse_kl": ({"loss__objective": "reverse_kl"}, kl),
    "forward_kl": ({"loss__objective": "forward_kl"}, lambda p, q: kl(q, p)),
    "jsd": (
        {"loss__objective": "jsd", "loss__jsd_beta": 0.3},
        lambda p, q: 0.3 * kl(q, mixed(0.3, q, p)) + 0.7 * kl(p, mixed(0.3, q, p)),
    ),
    "skewed_reverse_kl": (
        {"loss__objective": "skewed_reverse_kl", "loss__skew_alpha": 0.2},
        lambda p, q: kl(p, mixed(0.2, p, q)),
    ),
    "skewed_forward_kl": ({"loss__objective": "skewed_forward_kl"}, lambda p, q: kl(q, mixed(0.1, q, p))),
    "total_variation": ({"loss__objective": "total_variation"}, lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2),
    "top_k": ({"loss__objective": "top_k", "loss__top_k": K}, top_k),
}
VARIANTS: dict[str, dict[str, object]] = {
    "batches": {"batch__max_tokens": 40, "sampling__temperature": 0.7},
    "packed": {"batch__layout": "packed"},
    "sparse-backward": {"loss__backward": "sparse", "loss__sparse_error": 1e-6},
}
STEPS = [
    *(pytest.param(name, {}, "padded", id=f"{name}-padded") for name in CASES),
    *(
        pytest.param(name, options, "models", id=f"{name}-{variant}")
        for name in ("reverse_kl", "top_k")
        for variant, options in VARIANTS.items()
    ),
]


@pytest.mark.parametrize(("case", "options", "which"), STEPS)
def test_a_step_equals_the_same_step_by_hand(
    tmp_path: Path, case: str, options: dict[str, object], which: str, request: pytest.FixtureRequest
) -> None:
    used: Pair = request.getfixturevalue(which)
    chosen, formula = CASES[case]
    path = run(tmp_path / "run", used, optim__steps=1, optim__max_grad_norm="null", **chosen, **options)
    samples, (row,) = read_jsonl(path / "samples.jsonl"), read_jsonl(path / "metrics.jsonl")
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (used.student, used.teacher))
    temperature = float(str(options.get("sampling__temperature", 1.0)))

    pairs = [(logprobs(student, s, temperature), logprobs(teacher, s, temperature).detach()) for s in samples]
    values = torch.cat([formula(*pair) for pair in pairs])
    values.mean().backward()
    assert row["loss"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert row[f"policy/{'top_k_kl' if case == 'top_k' else case}_mean"] == pytest.approx(row["loss"], rel=1e-4)
    assert row[f"policy/{'top_k_kl' if case == 'top_k' else case}_max"] == pytest.approx(values.max().item(), rel=1e-4)
    for (name, parameter), found in zip(student.named_parameters(), first_moments(path), strict=True):
        assert parameter.grad is not None
        wanted = 0.1 * parameter.grad  # Adam's 1 − β₁
        error, scale = (found - wanted).abs().max(), wanted.abs().max()
        assert error <= 2e-3 * scale, f"{name}: off by {error} at a scale of {scale}"

    ours, theirs = [], []
    for sample, (_, log_q) in zip(samples, pairs, strict=True):
        tokens = torch.tensor([t for t, counted in zip(sample["ids"], sample["loss_mask"], strict=True) if counted])
        known = log_q.gather(1, tokens.clamp(max=log_q.shape[1] - 1)[:, None])[:, 0].where(tokens < WORDS, UNKNOWN)
        found = torch.tensor(list(itertools.compress(sample["teacher_logprobs"], sample["loss_mask"])))
        if case != "top_k" or which == "models":  # scoring is over the teacher's whole head
            torch.testing.assert_close(found, known, atol=1e-4, rtol=1e-4)
        ours.append(sum(sample["sampler_logprobs"]))
        theirs.append(sum(sample["teacher_logprobs"]))
    assert row["teacher_kl"] == pytest.approx((sum(ours) - sum(theirs)) / len(values), rel=1e-5)


def logprobs(model: Any, sample: dict[str, Any], temperature: float) -> Tensor:
    """[n, WORDS] of the completion, over the ids that both models have; an id that a model does not know is read as 0."""
    ids = torch.tensor([sample["ids"]])
    logits = model(ids.where(ids < model.config.vocab_size, 0)).logits[0, :-1, :WORDS]
    return torch.log_softmax(logits / temperature, -1)[torch.tensor(sample["loss_mask"][1:])]


@pytest.mark.parametrize("case", CASES)
def test_each_objective_learns(tmp_path: Path, models: Pair, case: str) -> None:
    options, _ = CASES[case]
    path = run(tmp_path / "run", models, optim__steps=15, optim__lr=0.03, sampling__prompts_per_step=12, **options)
    losses = [row["loss"] for row in read_jsonl(path / "metrics.jsonl")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(tmp_path: Path, models: Pair) -> None:
    path = run(tmp_path / "run", models._replace(teacher=models.student), optim__steps=1, loss__objective="reverse_kl")
    (row,) = read_jsonl(path / "metrics.jsonl")
    assert row["loss"] == pytest.approx(0, abs=1e-6)
    assert row["optim/grad_norm"] < 1e-5
    assert row["policy/top1_agreement"] == 1.0
    assert row["sampler_mismatch/mean_abs"] < 1e-5


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
def test_a_served_top_k_teacher_equals_the_local_one(tmp_path: Path, models: Pair, api: str) -> None:
    options, _ = CASES["top_k"]
    local = run(tmp_path / "local", models, optim__steps=2, **options)
    with serving(models.teacher) as stub:
        settings = distillation(tmp_path / "served", *models, optim__steps=2, **options) | {
            "teacher.path": "",
            "teacher.server.url": stub.url,
            "teacher.server.model": "stub",
            "teacher.server.api": api,
        }
        served = distill(config("distill", settings)).path
    for a, b in zip(*(read_jsonl(path / "metrics.jsonl") for path in (served, local)), strict=True):
        assert a["policy/top_k_kl_mean"] == pytest.approx(b["policy/top_k_kl_mean"], rel=1e-3)
        assert a["teacher_kl"] == pytest.approx(b["teacher_kl"], abs=1e-4)
        assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-3)


@pytest.mark.parametrize("case", ["reverse_kl", "top_k"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, models: Pair, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**CASES[case][0], "optim__steps": 4, "checkpoint__every": 2}
    whole = run(tmp_path / "whole", models, **options)
    interrupt(monkeypatch, distillation(tmp_path / "run", *models, **options), 3)
    check_equal(run(tmp_path / "run", models, **options), whole)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab_size", [None, 40])
def test_the_likeliest_tokens_are_those_of_the_logits(softcap: float | None, vocab_size: int | None) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 7, 16), torch.randn(50, 16), torch.randn(50)
    options: dict[str, Any] = {"temperature": 0.7, "logit_scale": 1.5, "softcap": softcap, "vocab_size": vocab_size}
    found = linear_top_k(hidden, weight, 6, bias=bias, chunk_size=4, **options)
    logits = (hidden @ weight.t() + bias) * 1.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = torch.log_softmax(logits[..., :vocab_size] / 0.7, -1).topk(6, -1)
    assert torch.equal(found.ids, wanted.indices)
    torch.testing.assert_close(found.logprobs, wanted.values)
    with pytest.raises(ValueError, match=r"k is 60; it must be between 1 and the vocabulary, "):
        linear_top_k(hidden, weight, 60, **options)


def test_the_likeliest_tokens_of_16_bit_models_under_autocast() -> None:
    model = llama(64).to(torch.bfloat16)
    hidden = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_top_k(hidden, model.lm_head.weight.float(), 3)
    assert found.logprobs.dtype == torch.float32
    assert found.ids.shape == (5, 3)
