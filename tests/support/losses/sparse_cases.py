"""Problems of the sparse backward, and how far a gradient is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import with_gradients
from loss_cases import Forms, each_of, fused
from problem import Problem, generator, make_problem
from torch import Tensor

from fastkl.kernels.sparse import estimator as sparse_estimator
from fastkl.loss import Sparse

SEED = 3
SPARSE: dict[str, Any] = {"backward": Sparse(SEED)}
FORMS: Forms = {
    "linear_logprobs": ("linear_logprobs", {}),
    "policy_gradient": ("policy_gradient", {}),
    "policy_gradient-none": ("policy_gradient", {"reduction": "none"}),
    "policy_gradient-entropy": ("entropy", {"entropy_coef": 0.1}),
    "reverse_kl": ("reverse_kl", {}),
    "reverse_kl-none": ("reverse_kl", {"reduction": "none"}),
}
each_form = each_of(FORMS)


def use_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_estimator, "BLOCK_ROWS", {"cpu": 16, "accelerator": 16})


def peaked_problem(n: int = 64, dtype: torch.dtype = torch.float64, vocabulary: int = 4000) -> Problem:
    """Rows with a few likely tokens and a long tail: a bias as Zipf's law has it, and logits of deviation 1 on top."""
    p = make_problem((n,), vocabulary, dim=24, seed=2, spread=1.0)
    bias = -1.6 * torch.log(1.0 + torch.arange(vocabulary, dtype=torch.float64))
    log_p = torch.log_softmax(p.hidden @ p.weight.t() + bias, -1)
    tokens = torch.multinomial(log_p.exp(), 1, generator=generator(1)).squeeze(1)
    behaviour = log_p.gather(1, tokens[:, None]).squeeze(1)
    p = p._replace(
        bias=bias,
        tokens=tokens,
        mask=None,
        sampler_logprobs=behaviour,
        teacher_logprobs=(behaviour + 0.3 * p.advantages).clamp(max=0.0),
        teacher_hidden=torch.cat([p.hidden + 0.3 * p.teacher_hidden[:, :24], torch.zeros(n, 2)], 1),
        teacher_weight=torch.cat([p.weight, torch.zeros(vocabulary, 2)], 1),
        teacher_bias=bias,
    )
    per_token = torch.float64 if dtype == torch.float64 else torch.float32
    heads = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")
    floats = {f: t for f, t in p._asdict().items() if t is not None and t.is_floating_point()}
    return p._replace(**{f: t.to(dtype if f in heads else per_token) for f, t in floats.items()})


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def with_flat_rows(p: Problem, flat: slice) -> Problem:
    """The rows of `flat` are uniform: what makes the others peaked, the bias, becomes an input that they lack."""
    n = p.hidden.shape[0]
    switch = torch.ones(n, 1, dtype=p.hidden.dtype)
    switch[flat] = 0.0
    hidden = torch.cat([torch.where(switch == 0, 0.0, p.hidden), switch], 1)
    assert p.bias is not None
    weight = torch.cat([p.weight, p.bias[:, None]], 1)
    tokens = torch.where(switch[:, 0] == 0, torch.arange(n), p.tokens)
    return p._replace(hidden=hidden, weight=weight, bias=torch.zeros_like(p.bias), tokens=tokens, sampler_logprobs=None)


def bias_over_noise(
    name: str, needs: tuple[str, ...], problem: Problem | None = None, seeds: int = 250, **options: Any
) -> list[float]:
    """‖ḡ − g‖² S / mean ‖g_s − g‖² for each gradient that is drawn, about 1 without a bias."""
    p = peaked_problem(32, vocabulary=500) if problem is None else problem
    exact = with_gradients(fused, name, p, needs, **options).gradients
    draws = [
        with_gradients(fused, name, p, needs, backward=Sparse(seed, error=0.15), **options).gradients
        for seed in range(seeds)
    ]
    found = []
    for field, true in exact.items():
        errors = torch.stack([gradients[field] for gradients in draws]) - true
        noise = errors.square().sum() / seeds
        if field == "bias" and noise < 1e-20 * true.square().sum():
            continue  # exact where the loss is reduced
        found.append(float(errors.mean(0).square().sum() * seeds / noise))
    return found
