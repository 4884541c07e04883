"""Values and gradients against the reference in float64: equal in float64, as accurate as eager PyTorch below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import Result, assert_as_accurate, assert_results_as_accurate, assert_same, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DIVERGENCES, HEADS, LOSSES, NEEDS, POLICIES, REDUCED, REFERENCE_KLS, Forms, each_of, eager, fused
from problem import Problem, make_problem
from property_settings import PROPERTY

from fastkl.kernels.options import DIRECTIONS, TAILS

MANY = settings(PROPERTY, max_examples=80)
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
IDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]).expand(4, 8)
ENVIRONMENT = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)
REDUCTION = st.sampled_from([{}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 4.5}])


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> tuple[str, Problem, dict[str, Any]]:
    name, options = draw(st.sampled_from(sorted(LOSSES))), draw(HEAD)
    p = make_problem(
        draw(LEADS),
        vocabulary=draw(VOCABULARIES),
        dim=draw(st.sampled_from([1, 8, 17])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**31)),
        spread=draw(st.sampled_from([0.1, 2.0, 8.0])),  # an untrained head, a usual one, a confident one
    )
    mask = draw(st.sampled_from([p.mask, p.mask != 0, None]))
    p = p._replace(mask=mask, bias=draw(st.sampled_from([p.bias, None]))).sampled_under(**options)
    if name in REDUCED:
        options |= draw(REDUCTION)
    if name in ("policy_gradient", "sampled_reverse_kl"):
        options |= POLICIES[draw(st.sampled_from(sorted(POLICIES)))]
    if name == "sampled_reverse_kl" and p.hidden.dim() == 1:
        name = "policy_gradient"  # advantages are summed along a token dimension, which one token has not
    return name, p, options


@MANY
@given(cases((torch.float64,)))
def test_float64_equals_reference(case: tuple[str, Problem, dict[str, Any]]) -> None:
    name, p, options = case
    assert_same(with_gradients(fused, name, p, **options), with_gradients(eager, name, p, **options))


@MANY
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


@MANY
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


EVERYWHERE = {"teacher_temperature": 1.3, "teacher_logit_scale": 0.8, "teacher_softcap": 4.0}
EVERY_FORM: Forms = {
    "linear_logprobs": ("linear_logprobs", {}),
    **{policy: ("policy_gradient", options) for policy, options in POLICIES.items()},
    **{f"entropy-{method}": ("entropy", {"method": method}) for method in ("importance_sampling", "ppo", "reinforce")},
    **{f"ref-{key}": ("reference_kl", options) for key, options in REFERENCE_KLS.items()},
    "sampled_reverse_kl": (
        "sampled_reverse_kl",
        {"discount": 0.6, "coef": 1.4, "env_advantages": ENVIRONMENT, "sequence_ids": IDS},
    ),
    **{name: (name, EVERYWHERE) for name in DIVERGENCES},
    **{f"{d}-{t}": ("top_k", {"direction": d, "tail": t, "padded": 2}) for d in DIRECTIONS for t in TAILS},
    "sampled_tail": ("sampled_tail", {"padded": 2, "tail_weight": 1.0}),
}
# The reduction and who needs a gradient choose the plan, so all their pairs are here; what the head does to the logits is
# done in every plan by the same lines, so it alternates (each head alone, in every way: test_gradcheck.py).
PLANS = [
    ("frozen-head", "mean", "all-chunked"),
    ("frozen-head", "none", "plain"),
    ("all", "mean", "plain"),
    ("all", "none", "all-chunked"),
    ("bias-only", "mean", "all-chunked"),
    ("bias-only", "none", "plain"),
]


@pytest.mark.parametrize(("needs", "reduction", "head"), PLANS)
@each_of(EVERY_FORM)
def test_every_form_equals_reference(name: str, options: dict[str, Any], needs: str, reduction: str, head: str) -> None:
    p = make_problem((4, 8))
    p = p._replace(advantages=p.advantages.index_fill(1, torch.tensor([2]), 0.0))
    options = options | HEADS[head] | ({"reduction": reduction} if name in REDUCED else {})
    ours, plain = (with_gradients(f, name, p, NEEDS[needs], **options) for f in (fused, eager))
    assert_same(ours, plain)
    assert all(g.abs().max() > 0 for g in ours.gradients.values())


@pytest.mark.parametrize(("needs", "reduction", "head"), PLANS)
@pytest.mark.parametrize("policy", [p for p in (*POLICIES, "ref") if not p.endswith(("truncated", "bounded"))])
def test_without_a_sampler(policy: str, needs: str, reduction: str, head: str) -> None:
    """Every ratio is 1, and has its gradient."""
    p, options = make_problem((4, 8))._replace(sampler_logprobs=None), POLICIES.get(policy, {}) | HEADS[head]
    options["reduction"], name = reduction, "reference_kl" if policy == "ref" else "policy_gradient"
    for ratio in ("token", "sequence"):
        own = options | {"ratio": ratio}
        theirs = own | {"ratio": "token"}
        assert_same(
            with_gradients(fused, name, p, NEEDS[needs], **own), with_gradients(eager, name, p, NEEDS[needs], **theirs)
        )


@pytest.mark.parametrize(
    "normalizer",
    [7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64)],
    ids=["number", "int64", "float32", "float64"],
)
@pytest.mark.parametrize("name", REDUCED)
def test_normalizer_divides_in_the_compute_dtype(name: str, normalizer: float | torch.Tensor) -> None:
    """1 / 7 is not a float32; a count given as a tensor must not cost float64 its digits."""
    p = make_problem()
    ours = with_gradients(fused, name, p, normalizer=normalizer)
    assert_same(ours, with_gradients(eager, name, p, normalizer=7.0), tolerance=1e-13)


def test_acceptance_rule_reports_the_worst_place() -> None:
    exact = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    peer, ours = exact + 1e-3, exact + torch.tensor([[0.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"hidden at \(1, 0\): fastkl 3\.1, eager 3\.001, float64 3\.0"):
        assert_as_accurate("hidden", ours, peer, exact, slack=0.0)
    with pytest.raises(AssertionError, match=r"allowed error 0\.002"):  # a peer's NaN allows nothing
        assert_as_accurate("hidden", ours, peer.clone().index_fill_(0, torch.tensor([0]), torch.nan), exact, slack=0.0)
    nothing, zero = {"weight": torch.full((2,), torch.nan)}, {"weight": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(AssertionError, match="gradient of weight"):
        assert_results_as_accurate(Result(exact, nothing), Result(exact, zero), Result(exact, zero), make_problem())
