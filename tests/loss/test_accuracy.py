"""Values and gradients against the reference in float64: equal in float64, as accurate as eager PyTorch below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import (
    HEADS,
    LOSSES,
    NEEDS,
    POLICIES,
    Problem,
    Result,
    assert_as_accurate,
    assert_results_as_accurate,
    assert_same,
    eager,
    fused,
    fused_output,
    make_problem,
    with_gradients,
)
from property_settings import PROPERTY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# [] one token, [N] packed, [B, T] padded; 1 is a decoding step, 0 an empty micro-batch.
LEADS = st.sampled_from([(), (0,), (1,), (7,), (16,), (2, 5), (3, 0)])
# 2 is the least that has a choice, 13 and 31 are primes, 64 fills vector registers, 67 leaves a tail of 3.
VOCABULARIES = st.sampled_from([2, 13, 31, 64, 67])
HEAD = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1.7]),
        "logit_scale": st.sampled_from([0.25, 2.0]),
        "softcap": st.sampled_from([1.5, 30.0]),
        "chunk_size": st.sampled_from([1, 3, 100]),
        "skip_zero_rows": st.booleans(),
    },
)
REDUCTION = st.sampled_from([{}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 4.5}])


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> tuple[str, Problem, dict[str, Any]]:
    name = draw(st.sampled_from(LOSSES))
    p = make_problem(
        draw(LEADS),
        vocabulary=draw(VOCABULARIES),
        dim=draw(st.sampled_from([1, 8, 17])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**31)),
        spread=draw(st.sampled_from([0.1, 2.0, 8.0])),  # an untrained head, a usual one, a confident one
    )
    kind = draw(st.sampled_from(["weights", "bool", "none"]))
    p = p._replace(mask={"weights": p.mask, "bool": p.mask != 0, "none": None}[kind])
    if draw(st.booleans()):
        p = p._replace(bias=None)
    options = draw(HEAD)
    p = p.sampled_under(**options)
    if name != "linear_logprobs":
        options |= draw(REDUCTION)
    if name in ("policy_gradient", "sampled_reverse_kl"):
        options |= POLICIES[draw(st.sampled_from(sorted(POLICIES)))]
    if name == "sampled_reverse_kl" and p.hidden.dim() == 1:
        name = "policy_gradient"  # advantages are summed along a token dimension, which one token has not
    return name, p, options


@PROPERTY
@given(cases((torch.float64,)))
def test_float64_equals_reference(case: tuple[str, Problem, dict[str, Any]]) -> None:
    name, p, options = case
    assert_same(with_gradients(fused, name, p, **options), with_gradients(eager, name, p, **options))


@PROPERTY
@given(cases(), st.sampled_from(sorted(NEEDS)))
def test_error_no_larger_than_eager(case: tuple[str, Problem, dict[str, Any]], needs: str) -> None:
    name, p, options = case
    if needs == "bias-only" and p.bias is None:
        needs = "frozen-head"
    ours, peer, exact = (
        with_gradients(function, name, problem, NEEDS[needs], **options)
        for function, problem in ((fused, p), (eager, p), (eager, p.double()))
    )
    assert_results_as_accurate(ours, peer, exact, p, **options)


@PROPERTY
@given(cases((torch.bfloat16, torch.float16)))
def test_low_precision_loses_nothing_but_the_last_rounding(case: tuple[str, Problem, dict[str, Any]]) -> None:
    """Stricter: bf16 inputs are multiplied in fp32, so the peer is eager PyTorch on the inputs cast *up*."""
    name, p, options = case
    up = Problem(*[t.float() if t is not None and t.is_floating_point() else t for t in p])
    ours, peer, exact = (
        with_gradients(function, name, problem, **options)
        for function, problem in ((fused, p), (eager, up), (eager, p.double()))
    )
    assert ours.value.dtype == torch.float32
    assert_results_as_accurate(ours, peer, exact, p, **options)


@pytest.mark.parametrize("sampler", [True, False], ids=["sampler", "no-sampler"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_equals_reference(
    policy: str, needs: tuple[str, ...], head: dict[str, Any], sampler: bool
) -> None:
    p, options = make_problem((4, 8)), {**POLICIES[policy], **head}
    if not sampler:
        p = p._replace(sampler_logprobs=None)
        options.pop("truncate_ratio", None)
    for reduction in ("mean", "none"):
        results = [
            with_gradients(f, "policy_gradient", p, needs, reduction=reduction, **options) for f in (fused, eager)
        ]
        assert_same(*results)
        assert all(g.abs().max() > 0 for g in results[0].gradients.values())


@pytest.mark.parametrize(
    "normalizer",
    [7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64)],
    ids=["number", "int64", "float32", "float64"],
)
@pytest.mark.parametrize("name", LOSSES[1:])
def test_normalizer_divides_in_the_compute_dtype(name: str, normalizer: float | torch.Tensor) -> None:
    """1 / 7 is not a float32; a count given as a tensor must not cost float64 its digits."""
    p = make_problem()
    ours = with_gradients(fused, name, p, normalizer=normalizer)
    assert_same(ours, with_gradients(eager, name, p, normalizer=7.0), tolerance=1e-13)


def test_logprobs_and_metrics() -> None:
    p = make_problem((4, 8))
    output = fused_output("sampled_reverse_kl", p, method="ppo", temperature=0.8)
    active = (p.mask != 0) & (p.tokens != -100)
    exact = eager("linear_logprobs", p, temperature=0.8)
    torch.testing.assert_close(output.logprobs, exact.where(active, 0.0))
    log_ratio = (exact - p.sampler_logprobs)[active]
    ratio = log_ratio.exp()
    # A PPO token is clipped where the pessimistic side is the constant one.
    gain = -(p.mask * (p.sampler_logprobs - p.teacher_logprobs))[active]
    clipped = ((ratio > 1.2) & (gain > 0)) | ((ratio < 0.8) & (gain < 0))
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_fraction": clipped.double().mean(),
        "k1": -log_ratio.mean(),
        "k3": (ratio - 1 - log_ratio).mean(),
        "teacher_kl": (p.sampler_logprobs - p.teacher_logprobs)[active].mean(),
    }
    assert 0 < expected["clip_fraction"] < 1
    assert output.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert not output.metrics[name].requires_grad
        torch.testing.assert_close(output.metrics[name].double(), value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("importance_sampling", "reinforce")])
def test_clip_fraction_counts_the_tokens_that_a_clip_touched(policy: str) -> None:
    p, options = make_problem((4, 8))._replace(mask=None), POLICIES[policy]
    ratio = torch.exp(eager("linear_logprobs", p) - p.sampler_logprobs)
    clip = 1 - options.get("clip_low", 0.2), 1 + options.get("clip_high", 0.2)
    touched = ratio > options.get("truncate_ratio", torch.inf)
    ratio = ratio.clamp(max=options.get("truncate_ratio", torch.inf))
    method, up = options.get("method"), p.advantages > 0
    if method == "cispo":
        touched |= (ratio < clip[0]) | (ratio > clip[1])
    if method == "ppo":
        touched |= ((ratio > clip[1]) & up) | ((ratio < clip[0]) & ~up)
        touched |= (ratio > options.get("dual_clip", torch.inf)) & ~up
    expected = touched[p.tokens != -100].double().mean()
    assert 0 < expected < 1
    torch.testing.assert_close(fused_output("policy_gradient", p, **options).metrics["clip_fraction"], expected)


def test_reverse_kl_logprobs_and_metrics() -> None:
    p = make_problem((4, 8))
    output = fused_output("reverse_kl", p)
    active = (p.mask != 0) & (p.tokens != -100)
    per_token = eager("reverse_kl", p._replace(mask=None), reduction="none")[active]
    torch.testing.assert_close(output.logprobs, eager("linear_logprobs", p).where(active, 0.0))
    torch.testing.assert_close(output.metrics["reverse_kl_mean"], per_token.mean())
    torch.testing.assert_close(output.metrics["reverse_kl_max"], per_token.max())
    assert fused_output("reverse_kl", p, tokens=None).logprobs is None


def test_acceptance_rule_reports_the_worst_place() -> None:
    exact = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    peer, ours = exact + 1e-3, exact + torch.tensor([[0.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"hidden at \(1, 0\): fastkl 3\.1, eager 3\.001, float64 3\.0"):
        assert_as_accurate("hidden", ours, peer, exact, slack=0.0)
    nothing, zero = {"weight": torch.full((2,), torch.nan)}, {"weight": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(AssertionError, match="gradient of weight"):
        assert_results_as_accurate(Result(exact, nothing), Result(exact, zero), Result(exact, zero), make_problem())
