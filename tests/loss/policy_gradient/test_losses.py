"""`policy_gradient_loss` and `sampled_reverse_kl_loss`: ratios, entropy, sequences, metrics, and what never is NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_same, with_gradients
from loss_cases import POLICIES, eager, frozen_or_all, fused, fused_output, reference_logits
from problem import Problem, make_problem
from torch import Tensor

from fastkl import reference
from fastkl._loss.arguments import Reduction

IDS = torch.tensor([[7, 7, 7, 2, 2, 2], [4, 5, 5, 5, 5, 6]])
PER_TOKEN = ("hidden", "tokens", "mask", "advantages", "sampler_logprobs")
ratios = pytest.mark.parametrize("ratio", ["token", "sequence"])


# Sequences change weights and old log-probs alone, which the surrogate and the entropy take as they come: one method.
@frozen_or_all
@pytest.mark.parametrize("ids", [None, IDS], ids=["rows", "packed"])
@ratios
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"method": "ppo", "clip_low": 0.1, "entropy_coef": 0.2}], ids=["is", "ppo"])
def test_sequences(
    options: dict[str, Any], reduction: str, ratio: str, ids: Tensor | None, needs: tuple[str, ...]
) -> None:
    options = {"reduction": reduction, "ratio": ratio, "sequence_ids": ids, **options}
    p = make_problem((2, 6), seed=3)
    assert_same(*(with_gradients(f, "policy_gradient", p, needs, **options) for f in (fused, eager)))


def test_the_gradient_of_gspo() -> None:
    """Where nothing is clipped: d/dℓ of −Σ_sequences exp(mean log-ratio) A / G, A one number per sequence."""
    p = make_problem((3, 6), seed=1)
    advantages = torch.tensor([[1.0], [-0.5], [2.0]]).double().expand(3, 6)
    p = p._replace(mask=None, tokens=p.tokens.clamp(min=0), advantages=advantages)
    ours = with_gradients(fused, "policy_gradient", p, ("hidden",), ratio="sequence", reduction="sequence_mean")
    q = p.leaves(("hidden",))
    log_ratio = eager("linear_logprobs", q) - q.sampler_logprobs
    (-(torch.exp(log_ratio.mean(-1)) * q.advantages[:, 0]).mean()).backward()
    torch.testing.assert_close(ours.gradients["hidden"], q.hidden.grad)


@ratios
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("constant", [False, True], ids=["global", "constant"])
def test_neither_packing_nor_micro_batches_matter(reduction: str, ratio: str, constant: bool) -> None:
    """Four sequences as one batch, as two micro-batches, and packed into one row, under one normalizer for all."""
    p = make_problem((4, 5), seed=2)
    counted = (p.tokens != -100) * p.mask
    total = {"mean": counted.sum(), "sequence_mean": (counted.sum(-1) > 0).sum()}[reduction]
    options: dict[str, Any] = {"reduction": reduction, "ratio": ratio, "normalizer": 64.0 if constant else float(total)}
    whole, split, packed = p.leaves(), p.leaves(), p.leaves()
    fused("policy_gradient", whole, **options).backward()
    for rows in (slice(0, 1), slice(1, 4)):
        part = {f: getattr(split, f)[rows] for f in PER_TOKEN}
        fused("policy_gradient", split._replace(**part), **options).backward()
    flat = {f: getattr(packed, f).flatten(0, 1)[None] for f in PER_TOKEN}
    ids = torch.arange(4).repeat_interleave(5)[None]
    fused("policy_gradient", packed._replace(**flat), sequence_ids=ids, **options).backward()
    for other in (split, packed):
        torch.testing.assert_close(other.hidden.grad, whole.hidden.grad)
        torch.testing.assert_close(other.weight.grad, whole.weight.grad)


@ratios
def test_a_masked_sequence_counts_for_nothing(ratio: str) -> None:
    p, options = make_problem((3, 4)), {"reduction": "sequence_mean", "ratio": ratio}
    p = p._replace(mask=torch.tensor([[1.0], [0.0], [1.0]]).double().expand(3, 4), tokens=p.tokens.clamp(min=0))
    rest = p._replace(**{f: getattr(p, f)[[0, 2]] for f in PER_TOKEN})
    torch.testing.assert_close(fused("policy_gradient", p, **options), fused("policy_gradient", rest, **options))
    for skip in (True, False):  # no division by zero
        gradients = with_gradients(fused, "policy_gradient", p, **options, skip_zero_rows=skip).gradients
        assert all(g.isfinite().all() for g in gradients.values())
    nothing = with_gradients(fused, "policy_gradient", p._replace(mask=torch.zeros(3, 4)), **options)
    assert nothing.value == 0
    assert (nothing.gradients["hidden"] == 0).all()


def test_entropy_costs_no_gemm(gemms: dict[str, list[int]]) -> None:
    p = make_problem((10,))._replace(mask=None)
    with_gradients(fused, "entropy", p)
    counted = int((p.tokens != -100).sum())
    assert {name: sum(rows) for name, rows in gemms.items()} == dict.fromkeys(gemms, counted)


@pytest.mark.parametrize("method", ["importance_sampling", "reinforce", "ppo", "cispo"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_zero_advantage_is_never_nan(method: str, skip: bool) -> None:
    """Neither for a token that the student cannot emit nor for one whose ratio overflows."""
    p = make_problem((3,), dtype=torch.float32)._replace(
        bias=torch.zeros(11).index_fill(0, torch.tensor([4]), -torch.inf),
        tokens=torch.tensor([1, 4, 2]),
        advantages=torch.tensor([1.0, 0.0, 0.0]),
        sampler_logprobs=torch.tensor([-2.0, -2.0, -200.0]),
        mask=None,
    )
    for coef in (0.0, 0.1):
        options = {"method": method, "skip_zero_rows": skip, "entropy_coef": coef}
        value, gradients = with_gradients(fused, "policy_gradient", p, ("hidden",), **options)
        assert value.isfinite()
        assert gradients["hidden"].isfinite().all()


def counted(p: Problem) -> Tensor:
    return (p.tokens != -100) if p.mask is None else (p.mask != 0) & (p.tokens != -100)


def test_logprobs_and_metrics() -> None:
    p = make_problem((4, 8))
    output = fused_output("sampled_reverse_kl", p, method="ppo", temperature=0.8, entropy_coef=0.1)
    active, exact = counted(p), eager("linear_logprobs", p, temperature=0.8)
    torch.testing.assert_close(output.logprobs, exact.where(active, 0.0))
    log_ratio = (exact - p.sampler_logprobs)[active]
    ratio = log_ratio.exp()
    # A PPO token is clipped where the pessimistic side is the constant one.
    advantages = -(p.mask * (p.sampler_logprobs - p.teacher_logprobs))[active]
    clipped = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_fraction": clipped.double().mean(),
        "clip_low_fraction": ((ratio < 0.8) & (advantages < 0)).double().mean(),
        "clip_high_fraction": ((ratio > 1.2) & (advantages > 0)).double().mean(),
        "k1": -log_ratio.mean(),
        "k3": (ratio - 1 - log_ratio).mean(),
        "entropy": reference.entropy(reference_logits(p, temperature=0.8)[0])[active].mean(),
        "teacher_kl": (p.sampler_logprobs - p.teacher_logprobs)[active].mean(),
    }
    assert 0 < expected["clip_fraction"] < 1
    assert not any(value.requires_grad for value in output.metrics.values())
    found = {name: value.double() for name, value in output.metrics.items()}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert "entropy" not in fused_output("policy_gradient", p).metrics


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("importance_sampling", "reinforce")])
def test_clip_fraction_counts_the_tokens_that_a_clip_touched(policy: str) -> None:
    p, options = make_problem((4, 8))._replace(mask=None), POLICIES[policy]
    ratio = torch.exp(eager("linear_logprobs", p) - p.sampler_logprobs)
    clip = 1 - options.get("clip_low", 0.2), 1 + options.get("clip_high", 0.2)
    low, high = options.get("ratio_bounds", (0.0, torch.inf))
    outside = (ratio < low) | (ratio > high)
    touched = ratio > options.get("truncate_ratio", torch.inf)
    ratio = ratio.clamp(max=options.get("truncate_ratio", torch.inf))
    method, up = options.get("method"), p.advantages > 0
    if method == "cispo":
        touched |= (ratio < clip[0]) | (ratio > clip[1])
    if method == "ppo":
        touched |= ((ratio > clip[1]) & up) | ((ratio < clip[0]) & ~up)
        touched |= (ratio > options.get("dual_clip", torch.inf)) & ~up
    metrics = fused_output("policy_gradient", p, **options).metrics
    expected = {"clip_fraction": touched, "out_of_bounds_fraction": outside}
    expected = {name: which[counted(p)].double().mean() for name, which in expected.items() if which.any()}
    assert all(0 < value < 1 for value in expected.values())
    torch.testing.assert_close({name: metrics[name] for name in expected}, expected)


def test_a_normalizer_of_zero() -> None:
    """Nothing over nothing is 0. Where nobody looks, something over nothing is NaN, and never infinite."""
    factor = Reduction("mean", torch.tensor(0)).factor
    assert factor(torch.tensor(0.0)) == 0
    assert factor(torch.tensor(3.0)).isnan()
    assert Reduction("mean", torch.tensor(-2.0)).factor(torch.tensor(0.0)).isnan()
    assert Reduction("mean", torch.tensor(torch.nan)).factor(torch.tensor(3.0)).isnan()


def test_k3_is_the_samplers_under_any_ratio() -> None:
    metrics = [
        fused_output("policy_gradient", make_problem((2, 6)), ratio=ratio).metrics for ratio in ("token", "sequence")
    ]
    for key in ("k1", "k3"):
        torch.testing.assert_close(metrics[0][key], metrics[1][key])
    assert metrics[0]["ratio_max"] > metrics[1]["ratio_max"]
