"""`linear_token_stats`: log-probs, entropies, lse and top-1 of tokens, with any upstream gradients, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import Result, assert_as_accurate, assert_results_as_accurate, assert_same
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import HEADS, NEEDS, each_head, each_need
from problem import Problem, make_problem
from property_settings import PROPERTY
from sparse_cases import use_small_blocks
from torch import Tensor

from fastkl import reference
from fastkl.kernels import driver
from fastkl.loss import Sparse, TokenStats, linear_logprobs, linear_token_stats

NUMBERS = TokenStats._fields[:3]
Upstream = tuple[float, float, float]  # 0: the output is not used at all
ALL: Upstream = (1.0, -0.7, 0.4)


def stats_of(p: Problem, **options: Any) -> TokenStats:
    return linear_token_stats(p.hidden, p.weight, p.tokens, bias=p.bias, **options)


def plain(p: Problem, **head: Any) -> TokenStats:
    own = {k: v for k, v in head.items() if k in ("temperature", "logit_scale", "softcap")}
    z, counted = reference.logits(p.hidden, p.weight, p.bias, **own), p.tokens != -100
    top = z.gather(-1, p.tokens.where(counted, 0)[..., None]).squeeze(-1) == z.amax(-1)
    numbers = reference.logprobs(z, p.tokens), reference.entropy(z), torch.logsumexp(z, -1)
    return TokenStats(*(t.where(counted, 0.0) for t in numbers), top & counted)


def mixed(stats: TokenStats, upstream: Upstream) -> Tensor:
    """A value per token, of what has an upstream value; each token's own varies."""
    factors = torch.linspace(-1.0, 2.0, stats.lse.numel(), dtype=stats.lse.dtype).reshape(stats.lse.shape)
    return sum(
        factor * factors.roll(i) * t for i, (factor, t) in enumerate(zip(upstream, stats, strict=False)) if factor
    )


def result(stats: TokenStats, p: Problem, needs: tuple[str, ...], upstream: Upstream) -> Result:
    value = mixed(stats, upstream)
    gradients = torch.autograd.grad(value.sum(), [getattr(p, field) for field in needs])
    return Result(value.detach(), dict(zip(needs, gradients, strict=True)))


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.sampled_from(sorted(NEEDS)),
    st.sampled_from(sorted(HEADS)),
    st.tuples(*[st.sampled_from([0.0, 1.0, -0.3])] * 3).filter(any),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (7,), (2, 3), (2, 1, 3)]),
)
def test_any_upstream_gradients(
    seed: int, need: str, head: str, upstream: Upstream, entropy_grad: bool, skip: bool, lead: tuple[int, ...]
) -> None:
    needs, options = NEEDS[need], HEADS[head]
    p = make_problem(lead, seed=seed).leaves(needs)
    ours, exact = stats_of(p, entropy_grad=entropy_grad, skip_zero_rows=skip, **options), plain(p, **options)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
    assert ours.entropies.requires_grad == entropy_grad
    if not entropy_grad:
        exact = exact._replace(entropies=exact.entropies.detach())
        if upstream[0] == upstream[2] == 0.0:
            return
    assert_same(result(ours, p, needs, upstream), result(exact, p, needs, upstream))


@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("need", "entropy_grad"), [("all", True), ("frozen-head", True), ("frozen-head", False)])
def test_accuracy(head: dict[str, Any], dtype: torch.dtype, need: str, entropy_grad: bool) -> None:
    """No less accurate than plain torch in the same dtype."""
    p, needs = make_problem((3, 7), 40, 16, dtype), NEEDS[need]
    upstream = ALL if entropy_grad else (1.0, 0.0, 0.4)
    leaves = [p.leaves(needs), p.leaves(needs), p.double().leaves(needs)]
    ours = result(stats_of(leaves[0], entropy_grad=entropy_grad, **head), leaves[0], needs, upstream)
    peer, exact = (result(plain(q, **head), q, needs, upstream) for q in leaves[1:])
    assert_results_as_accurate(ours, peer, exact, p, **head)


@pytest.mark.parametrize("entropy_grad", [True, False])
def test_a_certain_token(entropy_grad: bool) -> None:
    """p[y] = 1: the gradient of the log-prob is 0, that of the lse the weight's row."""
    p = make_problem((4,), 30, 8, torch.float32)
    weight = p.weight.clone()
    weight[3] = 60.0 * p.hidden[0] / p.hidden[0].square().sum()
    p = p._replace(weight=weight, bias=None, tokens=torch.tensor([3, 3, 4, 5])).leaves(("hidden",))
    ours, exact = stats_of(p, entropy_grad=entropy_grad), plain(q := p.double().leaves(("hidden",)))
    for i, name in enumerate(("logprobs", "entropies", "lse")):
        if name == "entropies" and not entropy_grad:
            continue
        (gradient,) = torch.autograd.grad(ours[i].sum(), p.hidden, retain_graph=True)
        (expected,) = torch.autograd.grad(exact[i].sum(), q.hidden, retain_graph=True)
        assert_as_accurate(name, gradient, expected.float(), expected, 1e-5)
    assert ours.top1[0]


def test_gradcheck() -> None:
    for needs in NEEDS.values():
        p = make_problem((5,), 7, 3).leaves(needs)

        def function(*tensors: Tensor, p: Problem = p, needs: tuple[str, ...] = needs) -> tuple[Tensor, ...]:
            q = p._replace(**dict(zip(needs, tensors, strict=True)))
            return stats_of(q, **HEADS["all-chunked"])[:3]

        assert torch.autograd.gradcheck(function, tuple(getattr(p, field) for field in needs))


def test_several_likeliest_tokens() -> None:
    """All of the largest logit are, to the last bit; a smaller one is none, however close."""
    hidden = torch.ones(4, 1)
    weight = torch.tensor([[2.0], [2.0], [1.9999999], [-1.0]])
    assert linear_token_stats(hidden, weight, torch.arange(4)).top1.tolist() == [True, True, False, False]
    assert linear_token_stats(hidden.double(), weight.double(), torch.arange(4)).top1.tolist() == [
        True,
        True,
        False,
        False,
    ]
    flat = linear_token_stats(torch.zeros(3, 1), torch.randn(700, 1), torch.tensor([0, 600, -100]))
    assert flat.top1.tolist() == [True, True, False]


@pytest.mark.parametrize("needs", [(), ("hidden",)], ids=["values", "frozen-head"])
def test_a_row_of_nan_has_no_likeliest_token(needs: tuple[str, ...]) -> None:
    p = make_problem((2,), dtype=torch.float32)._replace(tokens=torch.tensor([0, 1]))
    p.hidden[0, 0] = torch.nan
    stats = stats_of(p.leaves(needs), entropy_grad=False)
    assert stats.lse.isnan().tolist() == [True, False]
    assert not stats.top1[0]


def test_a_forbidden_token() -> None:
    """A bias of −inf: the log-prob is −inf, and no likeliest token; the rest is that of the other ids."""
    bias = torch.zeros(9, dtype=torch.float64)
    bias[4] = -torch.inf
    p = make_problem((2,), 9)._replace(bias=bias, tokens=torch.tensor([4, 1])).leaves(("hidden",))
    stats = stats_of(p)
    assert stats.logprobs[0] == -torch.inf
    assert not stats.top1[0]
    z = reference.logits(p.hidden, p.weight)[:, torch.arange(9) != 4]
    torch.testing.assert_close(stats.lse, torch.logsumexp(z, -1))
    torch.testing.assert_close(stats.entropies, reference.entropy(z))
    (stats.entropies + stats.lse).sum().backward()
    assert p.hidden.grad.isfinite().all()


@pytest.mark.parametrize("entropy_grad", [True, False])
@pytest.mark.parametrize("skip", [True, False])
@each_need
def test_ignored_tokens_may_hold_anything(needs: tuple[str, ...], skip: bool, entropy_grad: bool) -> None:
    p = make_problem((6,))._replace(tokens=torch.tensor([1, -100, 2, -100, 0, 3]))
    hidden = p.hidden.clone()
    hidden[1], hidden[3] = torch.nan, torch.inf
    found = []
    for q in (p.leaves(needs), p._replace(hidden=hidden).leaves(needs)):
        stats = stats_of(q, skip_zero_rows=skip, entropy_grad=entropy_grad)
        found.append((stats, result(stats, q, needs, (1.0, 0.5 if entropy_grad else 0.0, -1.0))))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])
    assert [t[1].item() for t in found[1][0]] == [0.0, 0.0, 0.0, False]


def test_nothing_counts() -> None:
    p = make_problem((3,))._replace(tokens=torch.full((3,), -100)).leaves()
    stats = stats_of(p)
    (stats.logprobs + stats.entropies + stats.lse).sum().backward()
    assert not any(t.any() for t in (*stats, p.hidden.grad, p.weight.grad, p.bias.grad))
    empty = linear_token_stats(p.hidden[:0], p.weight, p.tokens[:0])
    assert all(t.shape == (0,) for t in empty)


def test_a_padded_vocabulary() -> None:
    p, cut = make_problem(vocabulary=11).leaves(), make_problem(vocabulary=11).leaves()
    p.tokens.clamp_(max=7)
    cut = cut._replace(tokens=p.tokens)
    ours = result(stats_of(p, vocab_size=8), p, NEEDS["all"], ALL)
    small = cut._replace(weight=cut.weight[:8], bias=cut.bias[:8])
    assert_same(ours, result(plain(small), cut, NEEDS["all"], ALL))


def test_weight_grad_takes_the_weights_gradient() -> None:
    p, q = make_problem().leaves(), make_problem().leaves()
    into = torch.ones_like(p.weight)
    for _ in range(2):
        mixed(stats_of(p, weight_grad=into), ALL).sum().backward()
    mixed(stats_of(q), ALL).sum().backward()
    assert p.weight.grad is None
    torch.testing.assert_close(into, 1.0 + 2.0 * q.weight.grad)


@pytest.mark.parametrize("entropy_grad", [True, False])
@pytest.mark.parametrize("need", ["frozen-head", "all"])
def test_a_sparse_backward(monkeypatch: pytest.MonkeyPatch, need: str, entropy_grad: bool) -> None:
    """Its mean over seeds is the exact gradient."""
    use_small_blocks(monkeypatch)
    p, needs = make_problem((24,), 300, dtype=torch.float64, spread=5.0).leaves(NEEDS[need]), NEEDS[need]
    upstream = ALL if entropy_grad else (1.0, 0.0, 0.4)
    exact = result(stats_of(p), p, needs, upstream)
    drawn = [
        result(stats_of(p, backward=Sparse(seed, error=0.3), entropy_grad=entropy_grad), p, needs, upstream)
        for seed in range(60)
    ]
    for field, gradient in exact.gradients.items():
        each = torch.stack([one.gradients[field] for one in drawn])
        assert (float((each[0] - gradient).norm()) > 0) == (field != "bias")  # a bias needs no product
        assert float((each.mean(0) - gradient).norm()) < 0.1 * float(gradient.norm())


PLANS = {  # needs, entropy_grad: rows of logits, of the gradient of hidden, and of the weight
    "values": ((), True, (1, 0, 0)),
    "frozen": (("hidden",), True, (2, 1, 0)),
    "frozen, detached": (("hidden",), False, (1, 1, 0)),
    "trained": (("hidden", "weight"), True, (2, 1, 1)),
    "trained, detached": (("hidden", "weight"), False, (2, 1, 1)),
}


@pytest.mark.parametrize(("needs", "entropy_grad", "units"), PLANS.values(), ids=PLANS)
def test_gemms(
    gemms: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    needs: tuple[str, ...],
    entropy_grad: bool,
    units: tuple[int, int, int],
) -> None:
    """In units of a product over all rows and the vocabulary; a CPU's scorer makes its own in tiles."""
    monkeypatch.setattr(driver, "scorer", lambda spec, inputs: None)
    p = make_problem((10,))._replace(tokens=torch.arange(10)).leaves(needs)
    stats = stats_of(p, entropy_grad=entropy_grad)
    if needs:
        (stats.logprobs + stats.lse).sum().backward()
    assert tuple(sum(calls) // 10 for calls in gemms.values()) == units


@pytest.mark.parametrize("entropy_grad", [True, False])
@pytest.mark.parametrize("need", ["frozen-head", "all"])
def test_one_graph(need: str, entropy_grad: bool) -> None:
    torch._dynamo.reset()
    needs, upstream = NEEDS[need], ALL if entropy_grad else (1.0, 0.0, 0.4)
    p = make_problem((2, 5)).leaves(needs)

    def step() -> Tensor:
        return mixed(stats_of(p._replace(hidden=torch.tanh(p.hidden)), entropy_grad=entropy_grad), upstream).sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        value = function()
        found.append((value, torch.autograd.grad(value, [getattr(p, field) for field in needs])))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("entropy_grad", [True, False])
def test_a_second_derivative_is_refused(entropy_grad: bool) -> None:
    p = make_problem().leaves(("hidden",))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(stats_of(p, entropy_grad=entropy_grad).lse.sum(), p.hidden, create_graph=True)


def test_the_graph_may_be_walked_again() -> None:
    p = make_problem().leaves()
    stats = stats_of(p)
    first = torch.autograd.grad(stats.logprobs.sum(), p.hidden, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(stats.logprobs.sum(), p.hidden), first)


def test_log_probs_are_those_of_linear_logprobs() -> None:
    p = make_problem((2, 9), 700, dtype=torch.bfloat16)
    logprobs = linear_logprobs(p.hidden, p.weight, p.tokens, bias=p.bias)
    torch.testing.assert_close(stats_of(p).logprobs, logprobs, rtol=1e-6, atol=1e-6)
