"""Entropy, sequence-level ratios and means over sequences in `policy_gradient_loss`; the baseline of the advantages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import NEEDS, Problem, generator, make_problem
from torch import Tensor

from fastkl import loss, reference

Gradients = tuple[Tensor, ...]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"temperature": 0.7, "logit_scale": 1.6, "softcap": 2.5, "chunk_size": 4},
}


def ours(p: Problem, **options: Any) -> loss.LossOutput:
    options = {"mask": p.mask, "bias": p.bias, **options}
    return loss.policy_gradient_loss(p.hidden, p.weight, p.tokens, p.advantages, p.sampler_logprobs, **options)


def gradients(value: Tensor, p: Problem, needs: tuple[str, ...]) -> Gradients:
    upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    return (value.detach(), *torch.autograd.grad(value, [getattr(p, f) for f in needs], upstream))


def plain(
    p: Problem,
    entropy_coef: float = 0.0,
    ratio: str = "token",
    reduction: str = "mean",
    normalizer: float | None = None,
    ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The loss as its definition reads; sequences by a loop over rows and ids."""
    head = {k: options.pop(k) for k in ("temperature", "logit_scale", "softcap") if k in options}
    options.pop("chunk_size", None)
    z = reference.logits(p.hidden, p.weight, p.bias, **head)
    logprobs, counted = reference.logprobs(z, p.tokens), p.tokens != -100
    mask = counted.to(z.dtype) if p.mask is None else p.mask * counted
    ids = torch.zeros_like(p.tokens) if ids is None else ids
    groups = [
        (row, (ids[row] == one) & (mask[row] != 0)) for row in range(len(ids)) for one in ids[row].unique().tolist()
    ]
    groups = [(row, where) for row, where in groups if where.any()]
    behaviour = p.sampler_logprobs
    if ratio == "sequence":
        behaviour = behaviour.clone()
        for row, where in groups:
            own = logprobs[row, where].detach()
            behaviour[row, where] = own - (own - p.sampler_logprobs[row, where]).mean()
    per_token = reference.policy_gradient(logprobs, p.advantages, behaviour, **options)
    per_token = per_token - entropy_coef * reference.entropy(z)
    if reduction == "sequence_mean":
        means = [(per_token * mask)[row, where].sum() / mask[row, where].sum() for row, where in groups]
        return torch.stack(means).sum() / (len(means) if normalizer is None else normalizer)
    return reference.reduce(per_token, mask, reduction, normalizer)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("method", ["importance_sampling", "ppo", "reinforce"])
def test_entropy(method: str, reduction: str, needs: tuple[str, ...], options: dict[str, Any]) -> None:
    p = make_problem((2, 6))
    p = p._replace(advantages=p.advantages * torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0]))
    options = {"entropy_coef": 0.3, "method": method, "reduction": reduction, **options}
    found = [
        gradients(f(q, **options), q, needs)
        for f in (lambda q, **o: ours(q, **o).loss, plain)
        for q in [p.leaves(needs)]
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_entropy_costs_no_gemm(gemms: dict[str, list[int]]) -> None:
    p = make_problem((10,))._replace(mask=None).leaves()
    ours(p, entropy_coef=0.1).loss.backward()
    counted = int((p.tokens != -100).sum())
    assert {name: sum(rows) for name, rows in gemms.items()} == dict.fromkeys(gemms, counted)


def test_entropy_of_extreme_rows() -> None:
    """One-hot, flat, forbidden tokens: float32 finds what float64 does, and no NaN."""
    z = torch.zeros(4, 9)
    z[0, 2], z[2, 3:] = 200.0, -torch.inf
    z[3] = -300.0
    tokens = torch.tensor([2, 0, 1, 5])
    found = []
    for dtype in (torch.float32, torch.float64):
        hidden = z.nan_to_num(neginf=-2e4).to(dtype).requires_grad_()
        output = loss.policy_gradient_loss(
            hidden, torch.eye(9, dtype=dtype), tokens, torch.ones(4), entropy_coef=0.5, reduction="sum"
        )
        output.loss.backward()
        found.append((output.loss.detach().double(), hidden.grad.double(), output.metrics["entropy"].double()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][2], reference.entropy(z.double()).mean())
    assert found[0][1].isfinite().all()


def test_forbidden_tokens_have_no_entropy() -> None:
    """A bias of −inf is a probability of 0: 0 · log 0 = 0, in value and gradient."""
    p = make_problem((5,))
    p = p._replace(
        bias=p.bias.index_fill(0, torch.tensor([3, 7]), -torch.inf), tokens=torch.tensor([0, 1, 2, 4, 5])
    ).leaves()
    output = ours(p, entropy_coef=0.5)
    output.loss.backward()
    assert output.loss.isfinite()
    assert p.hidden.grad.isfinite().all()
    assert p.weight.grad.isfinite().all()


IDS = torch.tensor([[7, 7, 7, 2, 2, 2], [4, 5, 5, 5, 5, 6]])


@pytest.mark.parametrize("ids", [None, IDS], ids=["rows", "packed"])
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"method": "ppo", "clip_low": 0.1, "entropy_coef": 0.2}], ids=["is", "ppo"])
def test_sequences(
    options: dict[str, Any], reduction: str, ratio: str, needs: tuple[str, ...], ids: Tensor | None
) -> None:
    p = make_problem((2, 6), seed=3)
    options = {"reduction": reduction, "ratio": ratio, **options}
    q, r = p.leaves(needs), p.leaves(needs)
    mine, theirs = ours(q, sequence_ids=ids, **options).loss, plain(r, ids=ids, **options)
    torch.testing.assert_close(gradients(mine, q, needs), gradients(theirs, r, needs), rtol=1e-9, atol=1e-11)


def test_the_gradient_of_gspo() -> None:
    """Where nothing is clipped: d/dℓ of −Σ_sequences exp(mean log-ratio) A / G, A one number per sequence."""
    p = make_problem((3, 6), seed=1)
    p = p._replace(
        mask=None, tokens=p.tokens.clamp(min=0), advantages=torch.tensor([[1.0], [-0.5], [2.0]]).double().expand(3, 6)
    )
    q = p.leaves(("hidden",))
    ours(q, ratio="sequence", reduction="sequence_mean").loss.backward()
    r = p.leaves(("hidden",))
    logprobs = reference.logprobs(reference.logits(r.hidden, r.weight, r.bias), r.tokens)
    (-(torch.exp((logprobs - r.sampler_logprobs).mean(-1)) * r.advantages[:, 0]).mean()).backward()
    torch.testing.assert_close(q.hidden.grad, r.hidden.grad)


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("constant", [False, True], ids=["global", "constant"])
def test_neither_packing_nor_micro_batches_matter(reduction: str, ratio: str, constant: bool) -> None:
    """Four sequences as one batch, as two micro-batches, and packed into one row, under one normalizer for all."""
    p = make_problem((4, 5), seed=2)
    counted = (p.tokens != -100) * p.mask
    total = {"mean": counted.sum(), "sequence_mean": (counted.sum(-1) > 0).sum()}[reduction]
    normalizer = 64.0 if constant else float(total)
    options: dict[str, Any] = {"reduction": reduction, "ratio": ratio, "normalizer": normalizer}
    whole = p.leaves()
    ours(whole, **options).loss.backward()
    split = p.leaves()
    for rows in (slice(0, 1), slice(1, 4)):
        fields = ("hidden", "tokens", "mask", "advantages", "sampler_logprobs")
        ours(split._replace(**{f: getattr(split, f)[rows] for f in fields}), **options).loss.backward()
    packed = p.leaves()
    ids = torch.arange(4).repeat_interleave(5)[None]
    flat = {
        f: getattr(packed, f).reshape(1, 20, *getattr(packed, f).shape[2:])
        for f in ("hidden", "tokens", "mask", "advantages", "sampler_logprobs")
    }
    ours(packed._replace(**flat), sequence_ids=ids, **options).loss.backward()
    for other in (split, packed):
        torch.testing.assert_close(other.hidden.grad, whole.hidden.grad)
        torch.testing.assert_close(other.weight.grad, whole.weight.grad)


def test_a_masked_sequence_counts_for_nothing() -> None:
    p = make_problem((3, 4))
    p = p._replace(mask=torch.tensor([[1.0] * 4, [0.0] * 4, [1.0] * 4]).double(), tokens=p.tokens.clamp(min=0))
    rest = p._replace(
        **{f: getattr(p, f)[[0, 2]] for f in ("hidden", "tokens", "mask", "advantages", "sampler_logprobs")}
    )
    for ratio in ("token", "sequence"):
        options: dict[str, Any] = {"reduction": "sequence_mean", "ratio": ratio}
        torch.testing.assert_close(ours(p, **options).loss, ours(rest, **options).loss)
    nothing = p._replace(mask=torch.zeros(3, 4).double()).leaves()
    output = ours(nothing, reduction="sequence_mean", ratio="sequence")
    output.loss.backward()
    assert output.loss == 0
    assert (nothing.hidden.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": "batch"}, "ratio is 'batch'; use one of token, sequence"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'; use one of mean, sum, sequence_mean, none"),
        ({"sequence_ids": torch.zeros(3)}, r"sequence_ids is \[3\] but hidden is \[2, 6, 5\]"),
        ({"reduction": "sequence_mean", "normalizer": -1.0}, "normalizer is -1.0"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(make_problem((2, 6)), **change)


def test_a_sequence_ratio_wants_the_samplers_logprobs() -> None:
    p = make_problem((2, 6))
    with pytest.raises(ValueError, match='ratio is "sequence", which needs old_logprobs'):
        loss.policy_gradient_loss(p.hidden, p.weight, p.tokens, p.advantages, ratio="sequence")


def rollouts(samples: int) -> tuple[Problem, Tensor, Tensor, loss.PerToken]:
    """8 states of a peaked student (0.8 nats), `samples` tokens drawn at each; a teacher 5 nats away, as at the start."""
    g, states, vocabulary, dim = generator(0), 8, 60, 12
    hidden = torch.randn(states, dim, generator=g, dtype=torch.float64)
    weight = 1.5 * torch.randn(vocabulary, dim, generator=g, dtype=torch.float64)
    teacher = hidden + torch.randn(states, dim, generator=g, dtype=torch.float64)
    z, z_teacher = hidden @ weight.t(), teacher @ weight.t()
    tokens = torch.multinomial(torch.softmax(z, -1), samples, replacement=True, generator=g).t()  # [samples, states]
    exact = loss.reverse_kl_loss(hidden, weight, teacher, weight, per_token=True).per_token
    assert exact is not None
    sampled, judged = (reference.logprobs(scores.expand(samples, -1, -1), tokens) for scores in (z, z_teacher))
    p = make_problem((2,))._replace(
        hidden=hidden, weight=weight, tokens=tokens, sampler_logprobs=sampled, teacher_logprobs=judged
    )
    return p, z.requires_grad_(), z_teacher, exact


def test_a_baseline_lowers_the_variance_and_leaves_the_mean() -> None:
    """One draw's gradient by the logits, over 4000: its mean is the exact gradient of the reverse KL either way."""
    p, z, z_teacher, exact = rollouts(4000)
    u = torch.nn.functional.one_hot(p.tokens, z.shape[-1]) - torch.softmax(z, -1).detach()  # d log-prob / dz
    found = {}
    for name, baseline in (("without", None), ("with", exact.reverse_kl.expand_as(p.tokens))):
        advantages = loss.reverse_kl_advantages(p.sampler_logprobs, p.teacher_logprobs, baseline=baseline)
        draws = -advantages[..., None] * u
        found[name] = draws.mean(0), draws.var(0).sum()
    assert found["with"][1] < 0.6 * found["without"][1]
    (gradient,) = torch.autograd.grad(reference.reverse_kl(z, z_teacher).sum(), z)
    for mean, variance in found.values():
        assert (mean - gradient).norm() < 2.0 * (variance / 4000).sqrt()


def test_only_a_tokens_own_baseline_is_taken_off() -> None:
    p = make_problem((2, 5))
    b = torch.rand(2, 5).double()
    options: dict[str, Any] = {"coef": 0.5, "discount": 0.8}
    plain_advantages = loss.reverse_kl_advantages(p.sampler_logprobs, p.teacher_logprobs, p.mask, **options)
    shifted = loss.reverse_kl_advantages(p.sampler_logprobs, p.teacher_logprobs, p.mask, baseline=b, **options)
    torch.testing.assert_close(shifted, (plain_advantages + 0.5 * p.mask * b).where(p.mask != 0, 0.0))
    with pytest.raises(ValueError, match=r"baseline is \[5\] but sampler_logprobs is \[2, 5\]"):
        loss.reverse_kl_advantages(p.sampler_logprobs, p.teacher_logprobs, baseline=b[0])


@pytest.mark.parametrize("method", ["importance_sampling", "reinforce", "ppo", "cispo"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_zero_advantage_is_never_nan(method: Any, skip: bool) -> None:
    """Neither for a token that the student cannot emit nor for one whose ratio overflows."""
    p = make_problem((3,), dtype=torch.float32)
    bias, sampler = torch.zeros(11).index_fill(0, torch.tensor([4]), -torch.inf), torch.tensor([-2.0, -2.0, -200.0])
    tokens, advantages = torch.tensor([1, 4, 2]), torch.tensor([1.0, 0.0, 0.0])
    p = p._replace(bias=bias, tokens=tokens, advantages=advantages, sampler_logprobs=sampler, mask=None).leaves(
        ("hidden",)
    )
    for coef in (0.0, 0.1):
        output = ours(p, method=method, skip_zero_rows=skip, entropy_coef=coef)
        (gradient,) = torch.autograd.grad(output.loss, p.hidden)
        assert output.loss.isfinite()
        assert gradient.isfinite().all()


def test_metrics_leave_out_what_is_masked() -> None:
    p = make_problem((2, 6))
    output = ours(p, entropy_coef=0.1)
    z = reference.logits(p.hidden, p.weight, p.bias)
    counted = (p.mask != 0) & (p.tokens != -100)
    torch.testing.assert_close(output.metrics["entropy"], reference.entropy(z)[counted].mean())


def test_k3_is_the_samplers_under_any_ratio() -> None:
    p = make_problem((2, 6))
    metrics = [ours(p, ratio=ratio).metrics for ratio in ("token", "sequence")]
    for key in ("k1", "k3"):
        torch.testing.assert_close(metrics[0][key], metrics[1][key])
    assert metrics[0]["ratio_max"] > metrics[1]["ratio_max"]


def test_a_masked_sequence_is_no_division_by_zero() -> None:
    p = make_problem((2, 4))
    p = p._replace(mask=torch.tensor([[1.0] * 4, [0.0] * 4]).double(), tokens=p.tokens.clamp(min=0)).leaves()
    ours(p, ratio="sequence", skip_zero_rows=False).loss.backward()
    assert p.hidden.grad.isfinite().all()
