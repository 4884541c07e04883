"""The losses from end to end with backend="triton", against backend="torch".

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import triton_device
from loss_cases import (
    DIVERGENCES,
    HEADS,
    TRAINABLE,
    Forms,
    Problem,
    assert_same,
    fused,
    fused_output,
    largest,
    logit_scale,
    make_problem,
    with_gradients,
)
from masked_rows import clean_and_dirty, masked_problem
from torch import Tensor

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
    p, out = masked_problem((4,), 20, 16, dtype=torch.float32)
    if name == "linear_logprobs":  # it has no mask
        p = p._replace(tokens=p.tokens.where(~out, -100))
    for argument, *given in clean_and_dirty(name, p.to(DEVICE), out.to(DEVICE), torch.nan):
        clean, dirty = (
            with_gradients(fused, name, q, backend="triton", skip_zero_rows=False, **options, **own) for q, own in given
        )
        assert clean.value.isfinite().all(), argument
        assert_same(dirty, clean)


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
