"""The losses from end to end with backend="triton", against backend="torch".

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_same, largest, logit_scale, with_gradients
from devices import triton_device
from loss_cases import DIVERGENCES, HEADS, Forms, fused, fused_output
from masked_rows import clean_and_dirty, masked_problem
from problem import TRAINABLE, Problem, make_problem
from torch import Tensor

from fastkl.kernels.epilogue import triton as epilogue_triton
from fastkl.kernels.options import DIRECTIONS, TAILS
from fastkl.kernels.score import triton as score_triton

DEVICE = triton_device()
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
FORMS: Forms = {
    "linear_logprobs": ("linear_logprobs", {}),
    "policy_gradient": ("policy_gradient", {}),
    "entropy": ("entropy", {}),
    "ppo": ("policy_gradient", {"method": "ppo"}),
    "cross_entropy": ("cross_entropy", {"per_token": True}),
    "cross_entropy-plain": ("cross_entropy", {"label_smoothing": 0.0, "z_loss": 0.01}),
    "reverse_kl": ("reverse_kl", {}),
    "reverse_kl-per_token": ("reverse_kl", {"per_token": True}),
    "jsd": ("jsd", {}),
    "jsd-per_token": ("jsd", {"per_token": True}),
    "top_k": ("top_k", {}),
    "hard-reverse_kl": ("reverse_kl", {"hard_coef": 0.5}),
    "hard-top_k": ("top_k", {"hard_coef": 0.5}),
    "sampled_tail": ("sampled_tail", {}),
    "hard-sampled_tail": ("sampled_tail", {"hard_coef": 0.5}),
}
# What is scored without logits where no gradient is wanted, and by which function.
SCORED = {
    "linear_logprobs": "token_nll",
    "policy_gradient": "token_nll",
    "entropy": "token_nll",
    "ppo": "token_nll",
    "cross_entropy-plain": "token_nll",
    "reverse_kl": "reverse_kl",
}
# Each row function.
MASKED: Forms = {
    **{name: (name, {}) for name in ("linear_logprobs", "policy_gradient", "entropy", "cross_entropy", *DIVERGENCES)},
    "sampled_tail": ("sampled_tail", {}),
    **{f"top_k-{d}-{t}": ("top_k", {"direction": d, "tail": t}) for d in DIRECTIONS for t in TAILS},
}
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
heads = pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all-chunked"]], ids=["plain", "all-chunked"])


def problem(dtype: torch.dtype, head: dict[str, Any]) -> Problem:
    own = {k: v for k, v in head.items() if k != "chunk_size"}
    return make_problem((2, 5), 150, 20, dtype).sampled_under(**own).to(DEVICE)


def rounding(p: Problem, head: dict[str, Any]) -> float:
    return 16 * torch.finfo(torch.float32).eps * logit_scale(p, **head)


@forms
@dtypes
@heads
def test_gradients(form: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    """Values to the rounding of float32 logits, gradients to that of their own dtype."""
    name, options = FORMS[form]
    p = problem(dtype, head)
    ours, other = (with_gradients(fused, name, p, backend=b, **options, **head) for b in ("triton", "torch"))
    near = rounding(p, head)
    torch.testing.assert_close(ours.value, other.value, rtol=near, atol=near)
    for field in TRAINABLE:
        expected = other.gradients[field]
        own = near + 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.gradients[field], expected, rtol=own, atol=own * largest(expected))


@forms
@dtypes
@heads
def test_no_gradients(monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    """Every output, and that what can be scored in 16 bits is."""
    name, options = FORMS[form]
    p, scored = problem(dtype, head), record_scoring(monkeypatch)
    ours, other = (outputs(name, p, backend=b, **options, **head) for b in ("triton", "torch"))
    near = rounding(p, head)
    assert scored == ([SCORED[form]] if dtype == torch.float16 and form in SCORED else [])
    assert ours.keys() == other.keys()
    for field, value in ours.items():
        torch.testing.assert_close(value, other[field], rtol=near, atol=near, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.parametrize(("name", "options"), MASKED.values(), ids=MASKED)
def test_garbage_in_masked_rows_stays_there(name: str, options: dict[str, Any]) -> None:
    """Without skipping, so that it goes through the kernels: NaN in them would show."""
    check_masked_rows(name, options, torch.float32, "triton")


def test_garbage_in_masked_rows_stays_there_without_logits() -> None:
    check_masked_rows("policy_gradient", {}, torch.float16, "epilogue")


def check_masked_rows(name: str, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    p, out = masked_problem((4,), 20, 16, dtype=dtype)
    if name == "linear_logprobs":  # it has no mask
        p = p._replace(tokens=p.tokens.where(~out, -100))
    for argument, *given in clean_and_dirty(name, p.to(DEVICE), out.to(DEVICE), torch.nan):
        clean, dirty = (
            with_gradients(fused, name, q, backend=backend, skip_zero_rows=False, **options, **own) for q, own in given
        )
        assert clean.value.isfinite().all(), argument
        assert_same(dirty, clean)


# What the plan without logits does, and what it leaves to the ordinary one.
WITHOUT_LOGITS: Forms = {
    "policy_gradient": ("policy_gradient", {}),
    "policy_gradient-none": ("policy_gradient", {"reduction": "none"}),
    "ppo": ("policy_gradient", {"method": "ppo", "clip_low": 0.01, "clip_high": 0.01}),  # slopes of 0
    "sampled_reverse_kl": ("sampled_reverse_kl", {"skip_zero_rows": False}),
}
WITH_LOGITS: Forms = {
    "on policy": ("policy_gradient", {"old_logprobs": None}),
    "entropy": ("entropy", {}),
    "logprobs": ("linear_logprobs", {}),
    "jsd": ("jsd", {}),
}


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all-chunked"]], ids=["plain", "all-chunked"])
@pytest.mark.parametrize("form", [*WITHOUT_LOGITS, *WITH_LOGITS])
def test_epilogue(monkeypatch: pytest.MonkeyPatch, form: str, head: dict[str, Any]) -> None:
    """Values and gradients of all of a head, as they are with logits."""
    name, options = {**WITHOUT_LOGITS, **WITH_LOGITS}[form]
    p, calls, original = problem(torch.float16, head), [], epilogue_triton.token_nll
    p = p if "old_logprobs" not in options else p._replace(sampler_logprobs=None)
    options = {k: v for k, v in options.items() if k != "old_logprobs"}
    monkeypatch.setattr(epilogue_triton, "token_nll", lambda *args: calls.append(form) or original(*args))
    ours, other = (with_gradients(fused, name, p, backend=b, **options, **head) for b in ("epilogue", "torch"))
    assert bool(calls) == (form in WITHOUT_LOGITS)
    near = rounding(p, head)
    torch.testing.assert_close(ours.value, other.value, rtol=near, atol=near)
    for field in TRAINABLE:
        expected = other.gradients[field]
        own = near + 2 * torch.finfo(torch.float16).eps
        torch.testing.assert_close(ours.gradients[field], expected, rtol=own, atol=own * largest(expected))


def record_scoring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scoring functions that are called from here on, by name."""
    calls: list[str] = []

    def record(name: str) -> None:
        original = getattr(score_triton, name)

        def recorded(*args: Any, **options: Any) -> None:
            calls.append(name)
            original(*args, **options)

        monkeypatch.setattr(score_triton, name, recorded)

    for name in ("token_nll", "reverse_kl"):
        record(name)
    return calls


@torch.no_grad()
def outputs(name: str, p: Problem, **options: Any) -> dict[str, Tensor]:
    """Everything that a loss returns, by name."""
    loss, logprobs, metrics, per_token = fused_output(name, p, **options)
    by_products = {} if per_token is None else per_token._asdict()
    return {"loss": loss, "logprobs": logprobs, **metrics, **by_products}
