"""Divergences as objectives of a distillation: each step against the same step written out with all the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import bucket, kl, listed
from run_cases import WORDS, Run, check_moments, completion_logprobs, counted, run
from server_cases import served
from stub_server import serving
from tiny_models import llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl.loss import linear_top_k
from fastkl.trainer.data.samples import UNKNOWN

K = 5


def mixed(share: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    return (share * log_p.exp() + (1 - share) * log_q.exp()).log()


def density_power(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of the power ½."""
    p, q = log_p.exp(), log_q.exp()
    return 2.0 * (p**1.5 / 1.5 - p * q**0.5 + 0.5 * q**1.5 / 1.5).sum(-1)


# An objective's own options of a run, and the same per token, from log-probs over the vocabulary.
Formula = Callable[[Tensor, Tensor], Tensor]
CASES: dict[str, tuple[dict[str, object], Formula]] = {
    "reverse_kl": ({}, kl),
    "forward_kl": ({}, lambda p, q: kl(q, p)),
    "jsd": ({"loss__jsd_beta": 0.3}, lambda p, q: 0.3 * kl(q, mixed(0.3, q, p)) + 0.7 * kl(p, mixed(0.3, q, p))),
    "skewed_reverse_kl": ({"loss__skew_alpha": 0.2}, lambda p, q: kl(p, mixed(0.2, p, q))),
    "skewed_forward_kl": ({}, lambda p, q: kl(q, mixed(0.1, q, p))),
    "total_variation": ({}, lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2),
    "density_power": ({"loss__divergence_power": 0.5}, density_power),
    "top_k": ({"loss__top_k": K}, lambda p, q: bucket(p, q, listed(p, q, K))),
}
OPTIONS = {name: {"loss__objective": name, **options} for name, (options, _) in CASES.items()}
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
    used: Path = request.getfixturevalue(which)
    _, formula = CASES[case]
    done = run(tmp_path / "run", used, optim__steps=1, optim__max_grad_norm="null", **OPTIONS[case], **options)
    (row,), temperature = done.metrics, float(str(options.get("sampling__temperature", 1.0)))
    student, teacher = (AutoModelForCausalLM.from_pretrained(used / name) for name in ("student", "teacher"))

    log_p, log_q = (
        [completion_logprobs(model, sample, temperature, WORDS) for sample in done.samples]
        for model in (student, teacher)
    )
    values = torch.cat([formula(p, q.detach()) for p, q in zip(log_p, log_q, strict=True)])
    values.mean().backward()
    assert row["loss"] == pytest.approx(values.mean().item(), rel=1e-4)
    name = "top_k_kl" if case == "top_k" else case
    assert row[f"policy/{name}_mean"] == pytest.approx(row["loss"], rel=1e-4)
    assert row[f"policy/{name}_max"] == pytest.approx(values.max().item(), rel=1e-4)
    check_moments(done.folder, student)

    for sample, q in zip(done.samples, log_q, strict=True):
        tokens = torch.tensor(counted(sample, "ids"))
        known = q.gather(1, tokens.clamp(max=q.shape[1] - 1)[:, None])[:, 0].where(tokens < WORDS, UNKNOWN)
        if case != "top_k" or which == "models":  # scoring is over the teacher's whole head
            found = torch.tensor(counted(sample, "teacher_logprobs"))
            torch.testing.assert_close(found, known.detach(), atol=1e-4, rtol=1e-4)
    ours, theirs = (sum(sum(s[f"{who}_logprobs"]) for s in done.samples) for who in ("sampler", "teacher"))
    assert row["teacher_kl"] == pytest.approx((ours - theirs) / len(values), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_each_objective_learns(tmp_path: Path, models: Path, case: str) -> None:
    small: dict[str, object] = {"optim__steps": 15, "optim__lr": 0.03, "sampling__prompts_per_step": 12}
    losses = [row["loss"] for row in run(tmp_path / "run", models, **small, **OPTIONS[case]).metrics]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(tmp_path: Path, models: Path) -> None:
    same = {"teacher__path": models / "student", "loss__objective": "reverse_kl"}
    (row,) = run(tmp_path / "run", models, optim__steps=1, **same).metrics
    assert row["loss"] == pytest.approx(0, abs=1e-6)
    assert row["optim/grad_norm"] < 1e-5
    assert row["policy/top1_agreement"] == 1.0
    assert row["sampler_mismatch/mean_abs"] < 1e-5


@pytest.fixture(scope="module")
def local_top_k(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Run:
    return run(tmp_path_factory.mktemp("run") / "local", models, optim__steps=2, **OPTIONS["top_k"])


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
def test_a_served_top_k_teacher_equals_the_local_one(tmp_path: Path, models: Path, local_top_k: Run, api: str) -> None:
    with serving(models / "teacher") as stub:
        server = served("teacher", stub, api=api)
        there = run(tmp_path / "served", models, optim__steps=2, **OPTIONS["top_k"], **server)
    for a, b in zip(there.metrics, local_top_k.metrics, strict=True):
        assert a["policy/top_k_kl_mean"] == pytest.approx(b["policy/top_k_kl_mean"], rel=1e-3)
        assert a["teacher_kl"] == pytest.approx(b["teacher_kl"], abs=1e-4)
        assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-3)


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
