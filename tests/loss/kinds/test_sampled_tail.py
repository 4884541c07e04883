"""`top_k_kl_loss` with tail="sampled": without bias, whatever the list, the head, the baseline and the sampler are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from accuracy import assert_same, with_gradients
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import HEADS, NEEDS, fused, fused_output, reference_logits
from problem import TRAINABLE, Problem, generator, make_problem
from property_settings import PROPERTY
from torch import Tensor

from fastkl import loss, reference
from fastkl.loss import Sparse

V, D, CONTEXTS = 11, 5, 3
PLAIN: dict[str, Any] = {"tail_baseline": None, "tail_weight": 1.0, "truncate_ratio": None}


class Lists(NamedTuple):
    ids: Tensor  # [contexts, k]
    logprobs: Tensor


def listed(log_q: Tensor, k: int, by: Tensor, padded: int = 0) -> Lists:
    """The k ids that `by` puts first, and what the teacher says of them; every other list ends with padding."""
    ids = by.topk(k).indices
    logprobs = log_q.gather(-1, ids)
    if padded:
        ids[::2, -padded:] = -1
    return Lists(ids, logprobs)


class Enumerated(NamedTuple):
    """Each token of each context as the sampled one: rows [contexts · V]."""

    p: Problem  # of the contexts
    lists: Lists
    log_q: Tensor  # [contexts, V]
    sampler: Tensor  # [contexts, V] log-probs of the policy that sampled
    head: Mapping[str, Any]

    def output(self, rows: Tensor, off_policy: bool = False, **options: Any) -> loss.LossOutput:
        """Of the hidden states of all rows."""
        return loss.top_k_kl_loss(
            rows,
            self.p.weight,
            *(t.repeat_interleave(self.log_q.shape[1], 0) for t in self.lists),
            bias=self.p.bias,
            tail="sampled",
            tokens=torch.arange(self.log_q.shape[1]).repeat(len(self.p.hidden)),
            token_teacher_logprobs=self.log_q.reshape(-1),
            sampler_logprobs=self.sampler.reshape(-1) if off_policy else None,
            **{"reduction": "none", **self.head, **options},
        )

    def mean(self, baseline: Tensor | float | None, off_policy: bool, needs: tuple[str, ...], **options: Any) -> Any:
        """Value and gradients averaged over the sampler's tokens, summed over contexts."""
        of = self._replace(p=self.p.leaves(needs))
        rows = of.p.hidden.repeat_interleave(self.log_q.shape[1], 0)
        found = of.output(rows, off_policy, tail_baseline=baseline, **options).loss
        weights = self.sampler if off_policy else torch.log_softmax(self.z(), -1)
        value = (found * weights.exp().reshape(-1)).sum()
        return value.detach(), torch.autograd.grad(value, [getattr(of.p, f) for f in needs])

    def variance(self, **options: Any) -> float:
        """Of the gradient by the hidden states under the student's own tokens: its trace, summed over contexts."""
        rows = self.p.hidden.repeat_interleave(self.log_q.shape[1], 0).requires_grad_()
        (gradient,) = torch.autograd.grad(self.output(rows, **options).loss.sum(), rows)
        gradient = gradient.reshape(*self.log_q.shape, -1)
        probabilities = torch.softmax(self.z(), -1)[..., None]
        mean = (probabilities * gradient).sum(1, keepdim=True)
        return float((probabilities * (gradient - mean).square()).sum())

    def z(self) -> Tensor:
        return reference_logits(self.p, **self.head)[0][:, : self.log_q.shape[1]]

    def exact(self, needs: tuple[str, ...], tail_weight: float = 1.0) -> Any:
        """The reverse KL over the vocabulary, or between it and the bucket."""
        p = self.p.leaves(needs)
        z, z_teacher = reference_logits(p, **self.head)
        whole, bucket = reference.reverse_kl(z, z_teacher), reference.top_k_kl(z, *self.lists)
        value = (tail_weight * whole + (1.0 - tail_weight) * bucket).sum()
        return value.detach(), torch.autograd.grad(value, [getattr(p, f) for f in needs])


def enumerated(
    k: int = 4, by: str = "teacher", padded: int = 0, seed: int = 0, spread: float = 2.0, head: str = "plain"
) -> Enumerated:
    p = make_problem((CONTEXTS,), V, D, seed=seed, spread=spread)._replace(mask=None)
    z, z_teacher = reference_logits(p, **HEADS[head])
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(z_teacher, -1)
    order = {"teacher": log_q, "student": log_p, "unlikely": -log_p - log_q}[by]
    sampler = torch.log_softmax(z + torch.randn(z.shape, generator=generator(seed), dtype=z.dtype), -1)
    return Enumerated(p, listed(log_q, k, order, padded), log_q, sampler, HEADS[head])


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, V),
    by=st.sampled_from(["teacher", "student", "unlikely"]),
    padded=st.integers(0, 2),
    head=st.sampled_from(sorted(HEADS)),
    needs=st.sampled_from(sorted(NEEDS)),
    baseline=st.sampled_from([None, 0.0, -0.7, 3.0, "per context"]),
    off_policy=st.booleans(),
    tail_weight=st.sampled_from([1.0, 0.5, 0.0]),
    spread=st.sampled_from([0.5, 2.0, 6.0]),
)
def test_the_mean_over_tokens_is_the_reverse_kl(
    seed: int,
    k: int,
    by: str,
    padded: int,
    head: str,
    needs: str,
    baseline: Any,
    off_policy: bool,
    tail_weight: float,
    spread: float,
) -> None:
    """Value and gradients, to 1e-10; at a smaller weight what is between it and the bucket."""
    of = enumerated(k, by, min(padded, k - 1), seed, spread, head)
    if baseline == "per context":
        baseline = torch.tensor([0.3, -2.0, 1.0]).double().repeat_interleave(V)
    value, gradients = of.mean(baseline, off_policy, NEEDS[needs], tail_weight=tail_weight)
    expected, exact = of.exact(NEEDS[needs], tail_weight)
    scale = max(1.0, *(float(g.abs().max()) for g in exact))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * scale)


def test_vocab_size() -> None:
    """Padding rows of the head take no part, and have a gradient of 0."""
    of = enumerated()
    padding = make_problem((1,), 3, D, seed=9)
    wide = of.p._replace(weight=torch.cat([of.p.weight, padding.weight]), bias=torch.cat([of.p.bias, padding.bias]))
    value, gradients = of._replace(p=wide, head={"vocab_size": V}).mean(0.4, False, TRAINABLE)
    expected, exact = of.exact(TRAINABLE)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-10, atol=1e-10)
        assert (found[len(wanted) :] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_of_a_reduced_loss(reduction: str) -> None:
    """With the tokens' probabilities as the mask: gradients that are made in the forward pass."""
    of = enumerated()
    p, mask = of.p.leaves(), torch.softmax(of.z(), -1).reshape(-1)
    rows = p.hidden.repeat_interleave(V, 0)
    output = of._replace(p=p).output(rows, tail_baseline=0.9, mask=mask, reduction=reduction)
    output.loss.backward()
    value, exact = of.exact(TRAINABLE)
    share = 1.0 / CONTEXTS if reduction == "mean" else 1.0
    torch.testing.assert_close(output.loss.detach(), share * value, rtol=1e-10, atol=1e-10)
    for field, wanted in zip(TRAINABLE, exact, strict=True):
        torch.testing.assert_close(getattr(p, field).grad, share * wanted, rtol=1e-10, atol=1e-10)


def test_both_terms_of_a_baseline_are_needed() -> None:
    """What a baseline takes from the sampled tokens it gives back: E 1[y∉K] ∇log p_y is ∇(1 − P), which is not 0."""
    of = enumerated()
    plain, with_baseline = (of.mean(c, False, ("hidden",)) for c in (None, 5.0))
    torch.testing.assert_close(with_baseline, plain, rtol=1e-10, atol=1e-10)
    z = of.z().detach().requires_grad_()
    probabilities = torch.softmax(z, -1)
    (one,) = torch.autograd.grad(1.0 - probabilities.gather(-1, of.lists.ids).sum(), z)
    assert float(one.abs().max()) > 0.01


def test_noise() -> None:
    """A weight w leaves w² of the variance; the mean gap as a baseline lowers it."""
    plain = half = centred = 0.0
    for seed in range(8):
        of = enumerated(3, seed=seed)
        probabilities = torch.log_softmax(of.z(), -1).exp().reshape(-1)
        found = of.output(of.p.hidden.repeat_interleave(V, 0)).per_token
        share = probabilities * found.outside
        plain += of.variance()
        half += of.variance(tail_weight=0.5)
        centred += of.variance(tail_baseline=float((share * found.gap).sum() / share.sum()))
    assert half == pytest.approx(0.25 * plain)
    assert centred < 0.9 * plain


@pytest.mark.parametrize("baseline", [None, 0.8])
def test_listed_tokens_add_nothing(baseline: float | None) -> None:
    """Whatever the teacher and the sampler say of them; a baseline's own term stays."""
    p = make_problem((4,))._replace(mask=None)
    log_q = torch.log_softmax(reference_logits(p)[1], -1)
    ids, logprobs = listed(log_q, 3, log_q)
    lists = {"teacher_ids": ids, "teacher_logprobs": logprobs}
    own = {"token_teacher_logprobs": torch.full((4,), -torch.inf), "sampler_logprobs": torch.full((4,), -9.0).double()}
    p = p._replace(tokens=ids[:, 1])
    ours = with_gradients(fused, "sampled_tail", p, **lists, **own, **PLAIN | {"tail_baseline": baseline})
    bucket = with_gradients(fused, "top_k", p, **lists)
    if baseline is None:
        assert_same(ours, bucket)
    else:
        mass = torch.softmax(reference_logits(p)[0], -1).gather(-1, ids).sum(-1)
        torch.testing.assert_close(ours.value, bucket.value + baseline * (1.0 - mass).mean())


def test_without_weight_it_is_the_bucket() -> None:
    p = make_problem((2, 6))
    ours = with_gradients(fused, "sampled_tail", p, **PLAIN | {"tail_weight": 0.0, "tail_baseline": 3.0})
    assert_same(ours, with_gradients(fused, "top_k", p))


@PROPERTY
@given(st.integers(0, 10**6), st.integers(0, V - 1))
def test_a_list_of_everything_is_the_exact_divergence(seed: int, token: int) -> None:
    p = make_problem((3,), V, D, seed=seed)._replace(mask=None, tokens=torch.full((3,), token))
    p = p._replace(sampler_logprobs=None)
    ours = with_gradients(fused, "sampled_tail", p, k=V, reduction="none", **PLAIN | {"tail_baseline": 2.0})
    exact = with_gradients(fused, "reverse_kl", p, reduction="none")
    torch.testing.assert_close(ours.value, exact.value, rtol=1e-9, atol=1e-11)
    for field, gradient in exact.gradients.items():
        torch.testing.assert_close(ours.gradients[field], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,)], ids=["number", "[1]", "[1, 1]", "one per token"])
def test_forms_of_a_baseline(shape: tuple[int, ...]) -> None:
    p = make_problem((3,))
    given = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=shape == (3,))
    ours = fused("sampled_tail", p, tail_baseline=given)
    torch.testing.assert_close(ours, fused("sampled_tail", p, tail_baseline=0.3))


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all-chunked"]], ids=["plain", "all"])
def test_metrics_and_by_products(head: dict[str, Any]) -> None:
    """Means over the rows that take part. Together they make the mean of the loss, where no ratio is in it."""
    p = make_problem((2, 9), seed=3)
    counted = (p.mask != 0) & (p.tokens != -100)
    own = {"k": 3, "squared_temperature": True, **head}
    output = fused_output("sampled_tail", p._replace(sampler_logprobs=None), **own, **PLAIN)
    z = reference_logits(p, **head)[0]
    log_q = torch.log_softmax(reference_logits(p)[1], -1)
    ids, logprobs = listed(log_q, 3, log_q)
    in_list = (ids == p.tokens[..., None]).any(-1)
    bucket = reference.top_k_kl(z, ids, logprobs)
    mass = torch.softmax(z, -1).gather(-1, ids).sum(-1)
    rho = torch.log1p(-mass) - torch.log1p(-logprobs.exp().sum(-1))
    gap = reference.logprobs(z, p.tokens) - p.teacher_logprobs - rho
    outside = counted & ~in_list
    assert 0 < int(outside.sum()) < int(counted.sum())
    found = output.per_token
    assert isinstance(found, loss.TailPerToken)
    assert torch.equal(found.outside, outside)
    torch.testing.assert_close(found.list_mass, mass.where(counted, 0.0))
    torch.testing.assert_close(found.bucket_kl, bucket.where(counted, 0.0))
    torch.testing.assert_close(found.gap, gap.where(outside, 0.0))
    torch.testing.assert_close(
        {name: output.metrics[name] for name in ("tail_share", "list_mass", "bucket_kl", "tail_gap")},
        {
            "tail_share": outside.double().sum() / counted.sum(),
            "list_mass": mass[counted].mean(),
            "bucket_kl": bucket[counted].mean(),
            "tail_gap": gap[outside].mean(),
        },
    )
    m = output.metrics
    torch.testing.assert_close(m["top_k_kl_mean"], m["bucket_kl"] + m["tail_share"] * m["tail_gap"])
    assert "ratio_mean" not in m


def test_ratios() -> None:
    """Those of `policy_gradient_loss`; a token that the list has is never clipped."""
    p = make_problem((2, 9), seed=3)
    ours = fused_output("sampled_tail", p, truncate_ratio=1.05)
    policy = fused_output("policy_gradient", p, truncate_ratio=1.05)
    for name in ("ratio_mean", "ratio_min", "ratio_max"):
        torch.testing.assert_close(ours.metrics[name], policy.metrics[name])
    assert 0.0 < float(ours.metrics["clip_fraction"]) < float(policy.metrics["clip_fraction"])


def test_a_token_far_from_the_sampler() -> None:
    """Beyond ±20 the ratio is a constant, as in `policy_gradient_loss`: the bucket's gradient is left."""
    p = make_problem((1,))._replace(mask=None)
    ids = torch.tensor([[0, 1, 2]])
    logprobs = torch.log_softmax(reference_logits(p)[1], -1)[:, :3]
    given = {"teacher_ids": ids, "teacher_logprobs": logprobs, **PLAIN}
    p = p._replace(tokens=torch.tensor([5]), sampler_logprobs=torch.tensor([-60.0]).double())
    far = with_gradients(fused, "sampled_tail", p, **given)
    bucket = with_gradients(fused, "top_k", p, teacher_ids=ids, teacher_logprobs=logprobs)
    assert float((far.value - bucket.value).abs()) > 1e6
    for field, gradient in bucket.gradients.items():
        torch.testing.assert_close(far.gradients[field], gradient)


class Edge(NamedTuple):
    z: list[float]  # of six ids, of which the first two are listed
    token: int
    q: list[float]  # the teacher's probabilities of the list
    teacher: float  # its log-prob of the token


IMPOSSIBLE = Edge([18.0, 17.0, 0.0, 0.0, 0.0, 0.0], 4, [0.6, 0.3], -torch.inf)
EDGES = {
    "the token is next to certain": Edge([0.0, 0.0, 0.0, 0.0, 25.0, 0.0], 4, [0.6, 0.3], -3.0),
    "the token is certain": Edge([0.0, 0.0, 0.0, 0.0, 200.0, 0.0], 4, [0.6, 0.3], -3.0),
    "the list is certain": Edge([200.0, 199.0, 0.0, 0.0, 0.0, 0.0], 4, [0.6, 0.3], -3.0),
    "the list is next to certain": Edge([18.0, 17.0, 0.0, 0.0, 0.0, 0.0], 4, [0.6, 0.3], -3.0),
    "the teacher is certain of the list": Edge([1.0, 2.0, 0.0, 0.5, -1.0, 0.0], 4, [0.75, 0.25], -20.0),
    "the teacher's list is above 1": Edge([1.0, 2.0, 0.0, 0.5, -1.0, 0.0], 4, [0.75, 0.255], -20.0),
    "both are certain of the list": Edge([50.0, 49.0, 0.0, 0.0, 0.0, 0.0], 4, [0.75, 0.25], -50.0),
    "the teacher does not know the token": Edge([1.0, 2.0, 0.0, 0.5, -1.0, 0.0], 4, [0.6, 0.3], -50.0),
    "the teacher is certain of the token": Edge([1.0, 2.0, 0.0, 0.5, -1.0, 0.0], 4, [1e-30, 1e-31], 0.0),
    "neither knows the list": Edge([-200.0, -200.0, 0.0, 0.5, -1.0, 0.0], 4, [1e-30, 1e-31], -1.0),
    "far down": Edge([-500.0, -500.0, -499.0, -500.0, -501.0, -500.0], 3, [0.6, 0.3], -4.0),
    "forbidden": Edge([1.0, 2.0, 0.0, 0.5, -torch.inf, 0.0], 4, [0.6, 0.3], -3.0),
    "forbidden to both": Edge([1.0, 2.0, 0.0, 0.5, -torch.inf, 0.0], 4, [0.6, 0.3], -torch.inf),
    "all of the tail forbidden": Edge([1.0, 2.0, *[-torch.inf] * 4], 4, [0.6, 0.3], -3.0),
}


# The mass that the teacher leaves, 1 − Σ q, is rounding: float32 has another one, and another divergence.
ROUNDED = ("the teacher is certain of the list", "the teacher's list is above 1", "both are certain of the list")


def evaluate(one: Edge, dtype: torch.dtype, sampler: float | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by the logits."""
    z, token, q, teacher = one
    hidden, weight = torch.zeros(1, 2, dtype=dtype), torch.zeros(6, 2, dtype=dtype)
    bias = torch.tensor(z, dtype=dtype, requires_grad=True)
    value = loss.top_k_kl_loss(
        hidden,
        weight,
        torch.tensor([[0, 1]]),
        torch.tensor([q], dtype=dtype).log(),
        bias=bias,
        tail="sampled",
        tokens=torch.tensor([token]),
        token_teacher_logprobs=torch.tensor([teacher], dtype=dtype),
        sampler_logprobs=None if sampler is None else torch.tensor([sampler], dtype=dtype),
        **options,
    ).loss
    (gradient,) = torch.autograd.grad(value, bias)
    return value.detach(), gradient


@pytest.mark.parametrize("baseline", [None, 1.5])
@pytest.mark.parametrize("sampler", [None, -2.0])
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, sampler: float | None, baseline: float | None) -> None:
    """Finite in float32, and as float64 has it; the gradient of a row sums to 0."""
    exact, gradient = evaluate(EDGES[name], torch.float64, sampler, tail_baseline=baseline)
    value, found = evaluate(EDGES[name], torch.float32, sampler, tail_baseline=baseline)
    assert exact.isfinite()
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(), torch.zeros(()).double(), atol=1e-9, rtol=0.0)
    if name not in ROUNDED:
        torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(found.double(), gradient, rtol=2e-5, atol=2e-5)
    assert value.isfinite()
    assert found.isfinite().all()


def test_a_token_next_to_certain_has_next_to_no_gradient() -> None:
    """1 − p[y] is no difference of nearly equal numbers."""
    one = EDGES["the token is next to certain"]
    (_, exact), (_, found) = (evaluate(one, dtype, None) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=2e-10)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_token_that_a_bias_forbids_adds_nothing(softcap: float | None) -> None:
    """Its probability in the bucket is 0, with a soft-cap too."""
    p = make_problem((1,))._replace(mask=None, tokens=torch.tensor([4]), sampler_logprobs=None)
    p = p._replace(bias=p.bias.index_fill(0, torch.tensor(4), -torch.inf))
    log_q = torch.log_softmax(reference_logits(p)[1], -1)
    ids, logprobs = torch.tensor([[0, 1, 2]]), log_q[:, :3]
    lists = {"teacher_ids": ids, "teacher_logprobs": logprobs, "softcap": softcap}
    ours = with_gradients(fused, "sampled_tail", p, **lists, **PLAIN)
    assert_same(ours, with_gradients(fused, "top_k", p, **lists))
    assert fused_output("sampled_tail", p, **lists, **PLAIN).logprobs.item() == -torch.inf


def test_what_the_teacher_cannot_emit_is_infinite() -> None:
    """As the reverse KL is; a floor makes it finite."""
    assert evaluate(IMPOSSIBLE, torch.float32, None)[0] == torch.inf
    assert evaluate(IMPOSSIBLE._replace(teacher=-50.0), torch.float32, None)[0].isfinite()
    assert evaluate(IMPOSSIBLE, torch.float32, None, tail_weight=0.0)[0].isfinite()


@pytest.mark.parametrize("backward", ["exact", Sparse(0)], ids=["exact", "sparse"])
def test_on_an_accelerator_a_wrong_token_makes_its_row_nan(monkeypatch: pytest.MonkeyPatch, backward: Any) -> None:
    monkeypatch.setattr("fastkl._loss.arguments.visible", lambda _: False)
    p = make_problem((4,))._replace(mask=torch.tensor([1.0, 1.0, 0.0, 1.0]), bias=None)
    p = p._replace(tokens=torch.tensor([1, 11, -7, 3])).leaves()
    value = fused("sampled_tail", p, reduction="none", backward=backward)
    assert value.isnan().tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(value.sum(), p.hidden)
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("needs", "units"), [((), (1, 0, 0)), (("hidden",), (1, 1, 0)), (("hidden", "weight"), (1, 1, 1))]
)
def test_no_gemm_more(gemms: dict[str, list[int]], needs: tuple[str, ...], units: tuple[int, int, int]) -> None:
    """Products of logits and of both gradients are those of the bucket."""
    p = make_problem((10,))._replace(tokens=torch.arange(10), mask=None).leaves(needs)
    value = fused("sampled_tail", p, tail_baseline=0.5)
    if needs:
        value.backward()
    assert tuple(sum(calls) // 10 for calls in gemms.values()) == units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    """Float32 losses, as near to float64 as the bucket's."""
    p = make_problem((40,), 101, 16, dtype)
    value, exact = (fused("sampled_tail", q, k=10, reduction="none") for q in (p, p.double()))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=5e-5)


@pytest.mark.slow
def test_one_graph_for_every_baseline() -> None:
    """A running mean is another number at each step."""
    torch._dynamo.reset()
    p = make_problem((2, 5)).leaves()
    compiled = torch.compile(
        lambda c: fused("sampled_tail", p, tail_baseline=c), fullgraph=True, backend="aot_eager", dynamic=False
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for c in (0.1, 0.7):
            baseline = torch.tensor(c, dtype=torch.float64)
            torch.testing.assert_close(compiled(baseline), fused("sampled_tail", p, tail_baseline=c))
