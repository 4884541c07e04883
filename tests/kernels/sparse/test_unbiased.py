"""Is the sparse gradient unbiased? The mean over many seeds must approach the exact one at the Monte-Carlo rate.

For independent g_1 … g_S with mean g, E ‖ḡ − g‖² = E ‖g_1 − g‖² / S. The ratio of the two sides is near 1 for an unbiased
estimator and near S · bias² / variance for another. Seeds are fixed: the tests cannot fail by chance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import FORMS, Forms, each_of, each_plan, frozen_or_all
from problem import TRAINABLE
from sparse_cases import bias_over_noise, peaked_problem, use_small_blocks, with_flat_rows
from torch import Tensor

from fastkl.kernels.sparse import probabilities as sparse_probabilities
from fastkl.kernels.sparse import pytorch as sparse_pytorch
from fastkl.loss import Sparse, linear_token_stats

# The estimator is given rows of a gradient, their slopes and the ids that the loss names. It does not know which divergence
# the gradient is of.
EACH: Forms = {
    **FORMS,
    "policy_gradient-ppo": ("policy_gradient", {"method": "ppo"}),
    "reference_kl": ("reference_kl", {"ref_kl": "k3", "ratio_bounds": (0.0, 1.5)}),
    "entropy-none": ("entropy", {"reduction": "none"}),
    "sampled_reverse_kl": ("sampled_reverse_kl", {"discount": 0.5}),
    "top_k-none": ("top_k", {"reduction": "none"}),
    "sampled_tail": ("sampled_tail", {}),
    "top_k-forward-drop": ("top_k", {"direction": "forward", "tail": "drop"}),
}
each = each_of(EACH)
FROZEN_OR_ALL = ("frozen-head", "all")
SOFTCAP: dict[str, Any] = {"softcap": 9.0, "temperature": 0.8}
CAPPED: Forms = {
    name: (name, SOFTCAP) for name in ("linear_logprobs", "policy_gradient", "entropy", "reverse_kl", "top_k")
}


@pytest.fixture(autouse=True)
def always_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    monkeypatch.setattr(sparse_probabilities, "BREAK_EVEN", 2.0)


@each_plan(EACH, FROZEN_OR_ALL)
def test_unbiased(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    ratios = bias_over_noise(name, needs, **options)
    assert len(ratios) >= min(2, len(needs))
    assert max(ratios) < 2.5, ratios


@each_plan(CAPPED, FROZEN_OR_ALL)
def test_unbiased_under_a_softcap(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    assert max(bias_over_noise(name, needs, **options)) < 2.5


@frozen_or_all
@pytest.mark.parametrize("options", [{"z_loss": 0.5}, {"z_loss": 0.5, "reduction": "none"}], ids=str)
def test_unbiased_with_a_z_loss(options: dict[str, Any], needs: tuple[str, ...]) -> None:
    """Its gradient by the logits of a row sums to something else than 0."""
    p = peaked_problem(32, vocabulary=500)
    p = p._replace(weight=p.weight + 0.3)  # a mean that all rows share
    assert max(bias_over_noise("cross_entropy", needs, p, seeds=60, **options)) < 2.5


@pytest.mark.parametrize("field", ["logprobs", "entropies", "lse"])
def test_unbiased_token_statistics(field: str) -> None:
    p = peaked_problem(32, vocabulary=500)
    weight = p.weight + 0.3
    hidden = p.hidden.clone().requires_grad_()

    def gradient(**options: Any) -> Tensor:
        stats = linear_token_stats(hidden, weight, p.tokens, bias=p.bias, **options)
        (found,) = torch.autograd.grad(getattr(stats, field).sum(), hidden)
        return found

    exact = gradient()
    errors = torch.stack([gradient(backward=Sparse(seed, error=0.15)) for seed in range(60)]) - exact
    assert errors.mean(0).square().sum() * len(errors) < 2.5 * errors.square().sum() / len(errors)


@frozen_or_all
@pytest.mark.parametrize("name", ["linear_logprobs", "policy_gradient"])
def test_unbiased_among_flat_blocks(monkeypatch: pytest.MonkeyPatch, name: str, needs: tuple[str, ...]) -> None:
    """Which blocks are exact does not depend on what is drawn in others."""
    monkeypatch.setattr(sparse_probabilities, "BREAK_EVEN", 0.5)
    p = with_flat_rows(peaked_problem(80, vocabulary=500), slice(16, 48))
    assert max(bias_over_noise(name, needs, p)) < 2.5


@each
def test_the_test_finds_a_bias(monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]) -> None:
    """Columns kept at random without the weights 1 / π: the tail is lost, as under a filter."""

    def unweighted(
        self: sparse_pytorch.PyTorchColumnSampler, gradient: Tensor, columns: sparse_pytorch.Columns
    ) -> Tensor:
        return gradient.index_select(1, columns.ids)

    monkeypatch.setattr(sparse_pytorch.PyTorchColumnSampler, "estimate", unweighted)
    assert min(bias_over_noise(name, TRAINABLE, seeds=60, **options)) > 5
