"""Ratios of `policy_gradient_loss`: their bounds, what is left out, and how advantages are given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import assert_same, with_gradients
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import eager, frozen_or_all, fused, fused_output
from problem import Problem, make_problem
from property_settings import PROPERTY
from torch import Tensor

METHODS: dict[str, dict[str, Any]] = {
    "importance_sampling": {},
    "truncated": {"truncate_ratio": 2.0},
    "reinforce": {"method": "reinforce"},
    "reinforce-truncated": {"method": "reinforce", "truncate_ratio": 2.0},
    "ppo": {"method": "ppo"},
    "dual_clip": {"method": "ppo", "dual_clip": 3.0},
    "cispo": {"method": "cispo"},
}
methods = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


def with_log_ratio(p: Problem, log_ratio: float, place: int = 0) -> Problem:
    """The token at a place of the flattened ones has this log-ratio, which its own log-prob cannot reach without help."""
    logprobs = eager("linear_logprobs", p).clone()
    old = logprobs - 0.1
    old.view(-1)[place] = logprobs.view(-1)[place] - log_ratio
    return p._replace(sampler_logprobs=old.clamp(max=0.0))


@methods
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("log_ratio", [19.9, 20.1, 100.0, math.inf])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_log_ratio_is_20_at_most(sign: float, log_ratio: float, ratio: str, options: dict[str, Any]) -> None:
    """In float32, where e^89 is infinite. The oracle clamps under autograd."""
    p = make_problem((2, 3), dtype=torch.float32)._replace(mask=None)
    p = with_log_ratio(p._replace(tokens=p.tokens.clamp(min=0), advantages=sign * torch.ones(2, 3)), log_ratio)
    output = fused_output("policy_gradient", p, ratio=ratio, **options)
    assert all(value.isfinite() for value in (output.loss, *output.metrics.values()))
    assert float(output.metrics["ratio_max"]) <= math.exp(20.0) * (1 + 1e-5)
    if ratio == "token" or math.isfinite(log_ratio):  # the oracle of sequences would need inf − inf
        ours, exact = (
            with_gradients(f, "policy_gradient", q, ratio=ratio, **options)
            for f, q in ((fused, p), (eager, p.double()))
        )
        torch.testing.assert_close(ours.value.double(), exact.value, rtol=1e-4, atol=1e-4)
        for field, gradient in ours.gradients.items():
            size = max(1.0, float(exact.gradients[field].abs().max()))
            torch.testing.assert_close(gradient.double(), exact.gradients[field], rtol=0, atol=1e-4 * size)


@methods
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_token_that_the_student_cannot_emit(ratio: str, skip: bool, options: dict[str, Any]) -> None:
    """Its ratio is e^−20, and so is its sequence's; only a loss of ℓ itself is infinite."""
    forbidden = torch.zeros(11).index_fill(0, torch.tensor([4]), -torch.inf)
    p = make_problem((2, 3), dtype=torch.float32)._replace(mask=None, bias=forbidden, advantages=torch.ones(2, 3))
    p = p._replace(tokens=torch.tensor([[1, 4, 2], [0, 3, 5]]), sampler_logprobs=torch.full((2, 3), -2.0))
    output = fused_output("policy_gradient", p, ratio=ratio, skip_zero_rows=skip, **options)
    assert all(value.isfinite() for value in output.metrics.values())
    assert float(output.metrics["ratio_min"]) == pytest.approx(math.exp(-20.0))
    if options.get("method") not in ("reinforce", "cispo"):
        assert output.loss.isfinite()
    found = with_gradients(fused, "policy_gradient", p, ("hidden",), ratio=ratio, skip_zero_rows=skip, **options)
    assert found.gradients["hidden"].isfinite().all()


@methods
@pytest.mark.parametrize("name", ["policy_gradient", "reference_kl"])
def test_a_token_that_is_impossible_for_every_policy(name: str, options: dict[str, Any]) -> None:
    """The ratio is 1, and the gradient what it tends to as the token's probability tends to 0."""
    p = make_problem((3,))._replace(mask=None, tokens=torch.tensor([4, 1, 4]))
    found = []
    for low in (-math.inf, -600.0):
        p = p._replace(bias=torch.zeros(11).double().index_fill(0, torch.tensor([4]), low))
        own = eager("linear_logprobs", p)
        p = p._replace(sampler_logprobs=own, teacher_logprobs=own)
        more = {"ref_kl": "k1", "ref_kl_coef": 0.3} if name == "reference_kl" else {}
        found += [with_gradients(f, name, p, ("hidden", "weight"), **more, **options) for f in (fused, eager)]
    assert (found[0].gradients["hidden"] != 0).all()
    for other in found[1:]:
        for field, gradient in found[0].gradients.items():
            torch.testing.assert_close(other.gradients[field], gradient)
    torch.testing.assert_close(found[0].value, found[1].value)


def test_a_truncated_ratio_keeps_its_gradient_at_any_size() -> None:
    p = make_problem((2,))._replace(
        mask=None, tokens=torch.tensor([1, 2]), advantages=torch.tensor([1.0, -1.0]).double()
    )
    far, near = (
        with_gradients(fused, "policy_gradient", with_log_ratio(p, size), truncate_ratio=2.0) for size in (100.0, 3.0)
    )
    assert_same(far, near)


def without(p: Problem, outside: Tensor) -> Problem:
    """The mask is 0 where a ratio is outside."""
    return p._replace(mask=p.mask * ~outside)


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated": {"truncate_ratio": 1.1},
    "dual_clip": {"method": "ppo", "dual_clip": 1.2},
    "cispo": {"method": "cispo"},
    "entropy": {"entropy_coef": 0.2},
    "none": {"reduction": "none"},
}


@frozen_or_all
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_outside_the_bounds_is_masked_but_counts(
    ratio: str, skip: bool, extra: dict[str, Any], needs: tuple[str, ...]
) -> None:
    """As a mask would do it, with the whole count as normalizer; the KL to the reference goes too."""
    p, bounds = make_problem((4, 6), seed=3), (0.8, 1.3) if ratio == "token" else (0.95, 1.5)
    active = (p.mask != 0) & (p.tokens != -100)
    log_ratio = eager("linear_logprobs", p) - p.sampler_logprobs
    if ratio == "sequence":
        means = [row[some].mean() for row, some in zip(log_ratio, active, strict=True)]
        log_ratio = torch.stack(means)[:, None].expand(4, 6)
    outside = (log_ratio.exp() < bounds[0]) | (log_ratio.exp() > bounds[1])
    options = {"ratio": ratio, "skip_zero_rows": skip, **extra}
    count = {} if "reduction" in extra else {"normalizer": float((p.mask * active).sum())}
    assert outside[active].any()
    assert not outside[active].all()
    ours = with_gradients(fused, "reference_kl", p, needs, ratio_bounds=bounds, **options)
    assert_same(ours, with_gradients(fused, "reference_kl", without(p, outside), needs, **options, **count))
    metrics = fused_output("reference_kl", p, ratio_bounds=bounds, **options).metrics
    torch.testing.assert_close(metrics["out_of_bounds_fraction"], outside[active].double().mean())
    everything = fused_output("reference_kl", p, **options).metrics  # the other metrics are of all tokens
    torch.testing.assert_close({name: metrics[name] for name in everything}, everything)


def test_sequences_outside_the_bounds_cost_a_forward_product_alone(gemms: dict[str, list[int]]) -> None:
    p = make_problem((2, 5))._replace(mask=None, bias=None)
    p = p._replace(tokens=p.tokens.clamp(min=0))
    shift = torch.tensor([[0.05], [3.0]]).double()
    p = p._replace(sampler_logprobs=eager("linear_logprobs", p) - shift)
    with_gradients(fused, "policy_gradient", p, ("hidden", "weight"), ratio="sequence", ratio_bounds=(0.5, 2.0))
    rows = {name: sum(found) for name, found in gemms.items()}
    assert rows == {"project": 20, "hidden_gradient": 5, "add_weight_gradient": 5}  # scored twice, once for the ratio


def test_the_bounds_themselves_are_inside() -> None:
    p = make_problem((3,))._replace(mask=None, tokens=torch.tensor([1, 2, 3]))
    p = p._replace(sampler_logprobs=eager("linear_logprobs", p))  # every ratio is 1
    for bounds, share in (((1.0, 2.0), 0.0), ((0.5, 1.0), 0.0), ((1.01, 2.0), 1.0), ((0.0, math.inf), 0.0)):
        output = fused_output("policy_gradient", p, ratio_bounds=bounds)
        assert float(output.metrics["out_of_bounds_fraction"]) == share
        assert (output.loss == 0) == (share == 1)


def test_nan_is_never_out_of_bounds() -> None:
    """A student's NaN does not vanish from the loss."""
    p = make_problem((3,))._replace(mask=None, tokens=torch.tensor([1, 2, 3]))
    hidden = p.hidden.clone()
    hidden[1] = torch.nan
    result = with_gradients(fused, "policy_gradient", p._replace(hidden=hidden), ratio_bounds=(0.5, 2.0))
    assert result.value.isnan()
    assert result.gradients["weight"].isnan().any()


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.sampled_from(["token", "sequence"]),
    st.sampled_from(["mean", "sequence_mean"]),
    st.integers(1, 9),
    st.sampled_from([(0.5, 1.2), (0.9, 3.0), (0.0, 1.0)]),
)
def test_bounds_see_neither_packing_nor_chunks(
    seed: int, ratio: str, reduction: str, chunk_size: int, bounds: tuple[float, float]
) -> None:
    p = make_problem((3, 5), seed=seed)
    options: dict[str, Any] = {"ratio": ratio, "reduction": reduction, "ratio_bounds": bounds}
    whole = with_gradients(fused, "reference_kl", p, **options)
    fields = ("hidden", "tokens", "mask", "advantages", "sampler_logprobs", "teacher_logprobs")
    packed = p._replace(**{f: getattr(p, f).flatten(0, 1)[None] for f in fields})
    ids = torch.arange(3).repeat_interleave(5)[None]
    other = with_gradients(fused, "reference_kl", packed, sequence_ids=ids, chunk_size=chunk_size, **options)
    other.gradients["hidden"] = other.gradients["hidden"].reshape(3, 5, -1)
    assert_same(whole, other)


@PROPERTY
@given(st.integers(0, 2**31), st.sampled_from([(4, 6), (3, 3), (1, 5), (5, 1), (2, 3, 4), (7,)]), st.booleans())
def test_an_advantage_for_each_row(seed: int, lead: tuple[int, ...], column: bool) -> None:
    """[B] or [B, 1] for tokens [B, T], a square one included: by the number of dimensions, never by their lengths."""
    p = make_problem(lead, seed=seed)
    one = p.advantages[..., 0]
    given_so = one[..., None] if column else one
    if given_so.shape == lead:
        return
    expanded = one[..., None].expand(lead)
    ours = with_gradients(fused, "policy_gradient", p._replace(advantages=given_so))
    assert_same(ours, with_gradients(fused, "policy_gradient", p._replace(advantages=expanded)))
    options = {"env_advantages": given_so}
    ours = with_gradients(fused, "sampled_reverse_kl", p, **options)
    assert_same(ours, with_gradients(fused, "sampled_reverse_kl", p, env_advantages=expanded))


def test_weights_of_the_surrogate_are_advantages_times_w() -> None:
    """Every method is homogeneous in A > 0's size, so that w · surrogate is the surrogate of w · A; counts stay."""
    p = make_problem((3, 6))
    weights = torch.rand(3, 6, dtype=torch.float64)
    counted = p.mask * (p.tokens != -100)
    for options in METHODS.values():
        per_token = fused("policy_gradient", p, reduction="none", **options)  # times the mask
        ours = fused("policy_gradient", p._replace(advantages=p.advantages * weights), **options)
        torch.testing.assert_close(ours, (per_token * weights).sum() / counted.sum())


def test_a_sequence_ratio_times_what_differs_within_the_sequence() -> None:
    """The value is that of the ratio times the mean, the gradient is not, until it is averaged first."""
    p = make_problem((1, 3))._replace(mask=None, tokens=torch.tensor([[0, 1, 2]]))
    p = p._replace(advantages=torch.tensor([[0.1, 1.0, 3.0]]).double())
    q = p.leaves(("hidden",))
    log_ratio = (eager("linear_logprobs", q) - q.sampler_logprobs).mean(-1, keepdim=True)
    value = -(log_ratio.exp() * q.advantages).mean()
    value.backward()
    options: dict[str, Any] = {"method": "ppo", "clip_high": 1e9, "clip_low": 1.0, "ratio": "sequence"}
    per_token = with_gradients(fused, "policy_gradient", p, ("hidden",), **options)
    averaged = p._replace(advantages=p.advantages.mean(-1, keepdim=True))
    of_mean = with_gradients(fused, "policy_gradient", averaged, ("hidden",), **options)
    torch.testing.assert_close(per_token.value, value.detach())
    torch.testing.assert_close(of_mean.value, value.detach())
    torch.testing.assert_close(of_mean.gradients["hidden"], q.hidden.grad)
    assert (per_token.gradients["hidden"] - q.hidden.grad).abs().max() > 0.01
