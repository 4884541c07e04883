"""Problems, the losses by name, and the acceptance rule, shared by the tests of the losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from fastkl import loss, reference
from fastkl.kernels.divergence.formula import Divergence

HEAD_OPTIONS = ("temperature", "logit_scale", "softcap")
TRAINABLE = ("hidden", "weight", "bias")

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "logit_scale": {"logit_scale": 1.6},
    "softcap": {"softcap": 2.5},
    # 6 rows in chunks of 4 -> 3 + 3 after balancing; with ignored rows the last chunk is shorter.
    "all-chunked": {"temperature": 0.7, "logit_scale": 1.6, "softcap": 2.5, "chunk_size": 4},
}
# Which tensors are trained; LoRA freezes the head, BitFit trains biases alone.
NEEDS: dict[str, tuple[str, ...]] = {"frozen-head": ("hidden",), "all": TRAINABLE, "bias-only": ("bias",)}
POLICIES: dict[str, dict[str, Any]] = {
    "importance_sampling": {},
    "importance_sampling-truncated": {"truncate_ratio": 1.1},
    "reinforce": {"method": "reinforce"},
    "reinforce-truncated": {"method": "reinforce", "truncate_ratio": 1.1},
    "ppo": {"method": "ppo", "clip_low": 0.1, "clip_high": 0.3},
    "ppo-dual_clip": {"method": "ppo", "dual_clip": 1.3},
    "ppo-truncated": {"method": "ppo", "truncate_ratio": 1.1},
    "cispo": {"method": "cispo", "clip_low": 1.0, "clip_high": 0.2},
    "cispo-truncated": {"method": "cispo", "truncate_ratio": 1.1},
    "cispo-below-1": {"method": "cispo", "clip_low": 1.0, "clip_high": -0.1},
    "importance_sampling-bounded": {"ratio_bounds": (0.8, 1.3)},
    "ppo-bounded": {"method": "ppo", "ratio_bounds": (0.7, 1.5), "truncate_ratio": 1.4},
}
REFERENCE_KLS: dict[str, dict[str, Any]] = {
    **{estimate: {"ref_kl": estimate, "ref_kl_ratio": False} for estimate in ("k1", "k2", "k3")},
    "k2-ratio": {"ref_kl": "k2"},
    "k3-ratio-ppo": {"method": "ppo", "dual_clip": 1.5},
    "k3-ratio-truncated": {"method": "cispo", "truncate_ratio": 1.1},
    "k3-ratio-bounded": {"method": "reinforce", "ratio_bounds": (0.7, 1.4), "entropy_coef": 0.1},
}
each_need = pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
frozen_or_all = pytest.mark.parametrize("needs", [NEEDS["frozen-head"], NEEDS["all"]], ids=["frozen-head", "all"])
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


class Problem(NamedTuple):
    """Everything a loss may be given. Per-token tensors are float32 at least."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    tokens: Tensor  # [...]
    mask: Tensor | None  # [...]
    advantages: Tensor  # [...]
    sampler_logprobs: Tensor | None  # [...]
    teacher_logprobs: Tensor  # [...]
    teacher_hidden: Tensor  # [..., D_t]
    teacher_weight: Tensor  # [V, D_t]
    teacher_bias: Tensor | None  # [V]

    def to_dtype(self, dtype: torch.dtype) -> Problem:
        return Problem(*[t.to(dtype) if t is not None and t.is_floating_point() else t for t in self])

    def double(self) -> Problem:
        return self.to_dtype(torch.float64)

    def to(self, device: str) -> Problem:
        return Problem(*[None if t is None else t.to(device) for t in self])

    def sampled_under(self, **options: Any) -> Problem:
        """The same noise between sampler and policy, for a head with other options than the plain one."""
        double = self.double()
        shift = eager("linear_logprobs", double, **options) - eager("linear_logprobs", double)
        behaviour = [self.sampler_logprobs + shift, self.teacher_logprobs + shift]
        sampler, teacher = (t.clamp(max=0.0).to(self.teacher_logprobs.dtype) for t in behaviour)
        return self._replace(sampler_logprobs=sampler, teacher_logprobs=teacher)

    def leaves(self, needs: tuple[str, ...] = TRAINABLE) -> Problem:
        """Detached copies, of which those named in `needs` require a gradient."""
        pairs = zip(self._fields, self, strict=True)
        return Problem(*[None if t is None else t.detach().clone().requires_grad_(f in needs) for f, t in pairs])


def pattern(message: str) -> str:
    """A regular expression for the parts of an error message, which " / " sets apart, in their order."""
    return ".*".join(map(re.escape, message.split(" / ")))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_problem(
    lead: tuple[int, ...] = (6,),
    vocabulary: int = 11,
    dim: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    spread: float = 2.0,
) -> Problem:
    """Logits of standard deviation `spread`; about one token in six is ignored, and a mask of weights 0, ½, 1 and 2.

    The sampler's log-probs are those of the plain head plus noise, so that ratios fall on both sides of every clip.
    """
    g, per_token = generator(seed), torch.float64 if dtype == torch.float64 else torch.float32
    teacher_dim = dim + 2

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    hidden, weight, bias = normal(*lead, dim), normal(vocabulary, dim, scale=spread / dim**0.5), normal(vocabulary)
    tokens = torch.randint(vocabulary, lead, generator=g)
    sampler = reference.logprobs(reference.logits(hidden, weight, bias), tokens) + normal(*lead, scale=0.4)
    sampler = sampler.clamp(max=0.0)
    tokens = tokens.where(torch.rand(lead, generator=g) > 1 / 6, -100)
    mask = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(4, lead, generator=g)]
    heads = [t.to(dtype) for t in (hidden, weight, bias)]
    teacher = [normal(*lead, teacher_dim), normal(vocabulary, teacher_dim, scale=spread / teacher_dim**0.5)]
    advantages, by_teacher = normal(*lead), (sampler + normal(*lead, scale=0.5)).clamp(max=0.0)
    rest = [t.to(per_token) for t in (mask, advantages, sampler, by_teacher)]
    return Problem(*heads, tokens, *rest, *[t.to(dtype) for t in (*teacher, normal(vocabulary))])


def in_dtype(p: Problem, dtype: torch.dtype, *fields: str) -> Problem:
    """The problem with these fields in another dtype."""
    return p._replace(**{f: getattr(p, f).to(dtype) for f in fields})


class Plain(NamedTuple):
    """What a definition is made of."""

    p: Problem
    z: Tensor  # [..., V], the student's logits
    z_teacher: Tensor
    mask: Tensor  # [...], 0 where a token is ignored
    sequences: list[tuple[int, Tensor]]  # a row, and which of its tokens [T] are the counted ones of a sequence


class Loss(NamedTuple):
    """A function of `fastkl.loss`, what it takes of a problem beside a head and a mask, and its value per token."""

    function: Callable[..., Any]
    arguments: Callable[[Problem, dict[str, Any]], dict[str, Any]]
    definition: Callable[..., Tensor]  # of a `Plain`, with the loss's own options
    options: Mapping[str, Any] = {}


def _policy_arguments(p: Problem, options: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": p.tokens, "advantages": p.advantages, "old_logprobs": p.sampler_logprobs}


def _reference_arguments(p: Problem, options: dict[str, Any]) -> dict[str, Any]:
    return {**_policy_arguments(p, options), "ref_logprobs": p.teacher_logprobs}


def _sampled_arguments(p: Problem, options: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": p.tokens, "teacher_logprobs": p.teacher_logprobs, "sampler_logprobs": p.sampler_logprobs}


def _head_arguments(p: Problem, options: dict[str, Any]) -> dict[str, Any]:
    fields = () if "teacher_logits" in options else ("teacher_hidden", "teacher_weight", "teacher_bias")
    return {"tokens": p.tokens, **{field: getattr(p, field) for field in fields}}


def _list_arguments(p: Problem, options: dict[str, Any]) -> dict[str, Any]:
    ids, logprobs = teacher_list(p, options.pop("k", 4), options.pop("padded", 0))
    return {"tokens": p.tokens, "teacher_ids": ids, "teacher_logprobs": logprobs}


def _tail_arguments(p: Problem, options: dict[str, Any]) -> dict[str, Any]:
    own = {"token_teacher_logprobs": p.teacher_logprobs, "sampler_logprobs": p.sampler_logprobs}
    return {**_list_arguments(p, options), **own}


def _policy_gradient(
    of: Plain, entropy_coef: float = 0.0, ratio: str = "token", sequence_ids: Tensor | None = None, **options: Any
) -> Tensor:
    logprobs, old = reference.logprobs(of.z, of.p.tokens), of.p.sampler_logprobs
    if ratio == "sequence":
        own, old = logprobs.detach(), old.clone()
        for row, where in of.sequences:
            old[row, where] = own[row, where] - (own - of.p.sampler_logprobs)[row, where].mean()
    bonus = entropy_coef * reference.entropy(of.z) if entropy_coef else 0.0
    return reference.policy_gradient(logprobs, of.p.advantages, old, bonus=bonus, **options)


def _reference_kl(of: Plain, **options: Any) -> Tensor:
    return _policy_gradient(of, ref_logprobs=of.p.teacher_logprobs, **options)


def _sampled_reverse_kl(
    of: Plain, coef: float = 1.0, discount: float = 0.0, env_advantages: Tensor | float = 0.0, **options: Any
) -> Tensor:
    active = (of.mask != 0).to(of.mask.dtype)  # a weight counts once, in the loss
    logprobs, ids = (of.p.sampler_logprobs, of.p.teacher_logprobs), options.get("sequence_ids")
    advantages = packed_advantages(*logprobs, active, ids, coef=coef, discount=discount) + env_advantages
    return _policy_gradient(of._replace(p=of.p._replace(advantages=advantages)), **options)


def _cross_entropy(of: Plain, **options: Any) -> Tensor:
    z = of.z.float() if of.z.dtype == torch.float16 else of.z  # the sum over ids is beyond float16
    return reference.cross_entropy(z, of.p.tokens, **options)


def _top_k(of: Plain, k: int = 4, padded: int = 0, **options: Any) -> Tensor:
    return reference.top_k_kl(of.z, *teacher_list(of.p, k, padded), **options)


def _sampled_tail(of: Plain, tail: str = "sampled", k: int = 4, padded: int = 0, **options: Any) -> Tensor:
    likeliest, tokens = teacher_list(of.p, k, padded), (of.p.tokens, of.p.teacher_logprobs, of.p.sampler_logprobs)
    return reference.top_k_kl(of.z, *likeliest) + reference.sampled_tail(of.z, *likeliest, *tokens, **options)


def _divergence(name: str) -> Loss:
    definition, option = getattr(reference, name), PARAMETERS.get(name)

    def value(of: Plain, **options: Any) -> Tensor:
        z, z_teacher = of.z, of.z_teacher
        if option is not None and z.dtype == torch.float16:  # a mixture of probabilities underflows in float16
            z, z_teacher = z.float(), z_teacher.float()
        return definition(z, z_teacher, **options)

    own = {} if option is None else {option: {"beta": 0.3, "alpha": 0.2, "power": 0.7}[option]}
    return Loss(getattr(loss, f"{name}_loss"), _head_arguments, value, own)


DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
# What a divergence takes beside the logits: β, α or a power.
PARAMETERS = {
    name: own[2] for name in DIVERGENCES if len(own := list(signature(getattr(reference, name)).parameters)) > 2
}
_POLICY = Loss(loss.policy_gradient_loss, _policy_arguments, _policy_gradient)
LOSSES = {
    "linear_logprobs": Loss(
        loss.linear_logprobs, lambda p, _: {"tokens": p.tokens}, lambda of: reference.logprobs(of.z, of.p.tokens)
    ),
    "policy_gradient": _POLICY,
    "entropy": _POLICY._replace(options={"entropy_coef": 0.3}),
    "reference_kl": Loss(
        loss.policy_gradient_loss, _reference_arguments, _reference_kl, {"ref_kl_coef": 0.3, "ref_kl_ratio": True}
    ),
    "sampled_reverse_kl": Loss(loss.sampled_reverse_kl_loss, _sampled_arguments, _sampled_reverse_kl),
    "cross_entropy": Loss(
        loss.linear_cross_entropy, lambda p, _: {"targets": p.tokens}, _cross_entropy, {"label_smoothing": 0.1}
    ),
    "top_k": Loss(loss.top_k_kl_loss, _list_arguments, _top_k),
    "sampled_tail": Loss(
        loss.top_k_kl_loss,
        _tail_arguments,
        _sampled_tail,
        {"tail": "sampled", "tail_baseline": 0.4, "tail_weight": 0.8, "truncate_ratio": 1.3},
    ),
    **{name: _divergence(name) for name in DIVERGENCES},
}
REDUCED = tuple(name for name in LOSSES if name != "linear_logprobs")
LISTS = ("top_k", "sampled_tail")  # their teacher is a list, made before
# One for each way through the code. Which divergence it is the row function alone knows (tests/kernels/divergence), but for
# the reverse KL, which is scored without logits where no gradient is wanted.
WAYS = (
    "linear_logprobs",
    "policy_gradient",
    "entropy",
    "sampled_reverse_kl",
    "cross_entropy",
    "top_k",
    "reverse_kl",
    "jsd",
)
each_way = pytest.mark.parametrize("name", WAYS)
each_loss = pytest.mark.parametrize("name", LOSSES)
Forms = dict[str, tuple[str, dict[str, Any]]]
# Composed forms take any upstream gradient, the others have computed their gradients when the forward pass is over.
FORMS: Forms = {
    **{name: (name, {}) for name in WAYS},
    "policy_gradient-none": ("policy_gradient", {"reduction": "none"}),
    "cross_entropy-plain": ("cross_entropy", {"label_smoothing": 0.0, "z_loss": 0.01}),
    "reverse_kl-none": ("reverse_kl", {"reduction": "none"}),
}


def each_of(forms: Forms) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "options"), forms.values(), ids=forms)


def each_plan(forms: Forms, needs: tuple[str, ...] = tuple(NEEDS)) -> pytest.MarkDecorator:
    """Every form with all gradients, and one of each autograd function (per token, reduced) with some of them.

    Who needs a gradient is a matter of those functions, not of the loss inside: the other combinations are slow.
    """
    common = ("linear_logprobs", "policy_gradient")
    plans = [
        pytest.param(
            *form, NEEDS[need], id=f"{key}-{need}", marks=() if need == "all" or key in common else pytest.mark.slow
        )
        for key, form in forms.items()
        for need in needs
    ]
    return pytest.mark.parametrize(("name", "options", "needs"), plans)


def unreduced(name: str) -> dict[str, Any]:
    """The options that make a loss give one value per token."""
    return {} if name == "linear_logprobs" else {"reduction": "none"}


def fused(name: str, p: Problem, **options: Any) -> Tensor:
    """The loss of `fastkl.loss` called `name`: its differentiable tensor."""
    return fused_output(name, p, **options).loss


def fused_output(name: str, p: Problem, **options: Any) -> loss.LossOutput:
    """What it gives. `teacher_logits` take the place of a teacher's head; `k` and `padded` are of the list of top_k."""
    one = LOSSES[name]
    masked = {} if name == "linear_logprobs" else {"mask": p.mask}
    arguments = {"bias": p.bias, **masked, **one.arguments(p, options), **one.options, **options}
    found = one.function(p.hidden, p.weight, **arguments)
    return found if isinstance(found, loss.LossOutput) else loss.LossOutput(found, found.detach(), {})


def teacher_list(p: Problem, k: int = 4, padded: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of the k likeliest tokens of the plain teacher, found in float64.

    The last `padded` entries of every other row are padding.
    """
    bias = None if p.teacher_bias is None else p.teacher_bias.detach().double()
    z = reference.logits(p.teacher_hidden.detach().double(), p.teacher_weight.detach().double(), bias)
    logprobs, ids = torch.log_softmax(z, -1).topk(min(k, z.shape[-1]))
    if padded:
        ids[..., ::2, -padded:] = -1
    return ids, logprobs.to(p.teacher_logprobs.dtype)


def reference_logits(p: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    """z of student and teacher, with the options that a divergence takes."""
    head = {k: options[k] for k in HEAD_OPTIONS if k in options}
    theirs = {k: options[f"teacher_{k}"] for k in HEAD_OPTIONS if f"teacher_{k}" in options}
    theirs = {"temperature": head.get("temperature", 1.0), **theirs}
    z_teacher = reference.logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias, **theirs)
    return reference.logits(p.hidden, p.weight, p.bias, **head), z_teacher


def eager(name: str, p: Problem, **options: Any) -> Tensor:
    """The same loss, with the same options, from `fastkl.reference`; sequences by a loop over rows and ids."""
    one, counted = LOSSES[name], p.tokens != -100
    mask = counted.to(p.advantages.dtype) if p.mask is None else p.mask * counted
    heads = (*HEAD_OPTIONS, *(f"teacher_{k}" for k in HEAD_OPTIONS))
    elsewhere = (*heads, "reduction", "normalizer", "chunk_size", "skip_zero_rows")
    own = {k: v for k, v in {**one.options, **options}.items() if k not in elsewhere}
    ids = own.get("sequence_ids")
    z, z_teacher = reference_logits(p, **options)
    of = Plain(p, z, z_teacher, mask, _sequences(mask, ids))
    per_token = one.definition(of, **own)
    if name == "linear_logprobs":
        return per_token
    reduction, normalizer = options.get("reduction", "mean"), options.get("normalizer")
    if reduction == "sequence_mean":
        means = [(per_token * mask)[row, where].sum() / mask[row, where].sum() for row, where in of.sequences]
        return torch.stack(means).sum() / (len(means) if normalizer is None else normalizer)
    return reference.reduce(per_token, mask, reduction, normalizer)


def _sequences(mask: Tensor, ids: Tensor | None) -> list[tuple[int, Tensor]]:
    if mask.dim() != 2:
        return []
    ids = torch.zeros_like(mask) if ids is None else ids
    pairs = [(row, (ids[row] == one) & (mask[row] != 0)) for row in range(len(ids)) for one in ids[row].unique()]
    return [(row, where) for row, where in pairs if where.any()]


def packed_advantages(sampler: Tensor, teacher: Tensor, mask: Tensor, ids: Tensor | None, **options: Any) -> Tensor:
    """The oracle of `reverse_kl_advantages`: the reference's loop over each run of equal ids of each row."""
    shape = (sampler.shape[:-1].numel(), sampler.shape[-1])
    rows = [t.reshape(shape) for t in (sampler, teacher, mask)]
    groups = (torch.zeros_like(sampler) if ids is None else ids).reshape(shape)
    out = torch.zeros_like(rows[0])
    for row in range(out.shape[0]):
        for one in groups[row].unique():
            own = groups[row] == one
            out[row, own] = reference.reverse_kl_advantages(*[t[row, own] for t in rows], **options)
    return out.reshape(sampler.shape)


class Result(NamedTuple):
    value: Tensor
    gradients: dict[str, Tensor]


def with_gradients(
    function: Callable[..., Tensor], name: str, p: Problem, needs: tuple[str, ...] = TRAINABLE, **options: Any
) -> Result:
    """Value and gradients of `fused` or `eager`; each entry of a per-token result gets an upstream value of its own."""
    p = p.leaves(needs)
    value = function(name, p, **options)
    upstream = None
    if value.dim():
        upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    value.backward(upstream)
    wanted = {f: getattr(p, f) for f in needs if getattr(p, f) is not None}
    return Result(value.detach(), {f: torch.zeros_like(t) if t.grad is None else t.grad for f, t in wanted.items()})


def logit_scale(p: Problem, **options: Any) -> float:
    """The largest finite logit, at least 1: a float32 logit is off by about eps times that, whoever computes it."""
    head = {k: v for k, v in options.items() if k in HEAD_OPTIONS}
    double = p.double()
    z = reference.logits(double.hidden, double.weight, double.bias, **head)
    return float(z.where(z.isfinite(), 0.0).abs().max().clamp(min=1.0)) if z.numel() else 1.0


def assert_as_accurate(what: str, ours: Tensor, peer: Tensor, exact: Tensor, slack: float, factor: float = 2.0) -> None:
    """|ours − exact| ≤ factor · max |peer − exact| + slack, everywhere; the message has the worst place.

    The maximum runs over the whole tensor: a peer that happens to be exact at one place says nothing about that place. Nor
    does one that has NaN there.
    """
    assert ours.shape == exact.shape, f"{what}: {list(ours.shape)} instead of {list(exact.shape)}"
    if ours.numel() == 0:
        return
    error = (ours.double() - exact).abs()
    allowed = float(factor * (peer.double() - exact).abs().nan_to_num(nan=0.0).max() + slack)
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    values = [float(t.reshape(-1)[worst]) for t in (ours, peer, exact)]
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
    assert float(error.reshape(-1)[worst]) <= allowed, (
        f"{what} at {place}: fastkl {values[0]!r}, eager {values[1]!r}, float64 {values[2]!r}; allowed error {allowed:.3g}"
    )


def assert_results_as_accurate(ours: Result, peer: Result, exact: Result, p: Problem, **options: Any) -> None:
    """The rule for the value and every gradient of problem `p`.

    On top of the peer's error: the rounding of float32 logits; of float32 probabilities, which cancel in p − 1 (a product
    with the other factor of the GEMM carries that into a gradient); and of a gradient to its own dtype, which happens
    twice (the unit gradient, then its product with the upstream one).
    """
    float32, logits = 4 * torch.finfo(torch.float32).eps, logit_scale(p, **options)
    value_size = max(1.0, largest(exact.value))
    assert_as_accurate("value", ours.value, peer.value, exact.value, float32 * logits * value_size)
    factors = {"hidden": largest(p.weight), "weight": largest(p.hidden), "bias": 1.0}
    for field, gradient in ours.gradients.items():
        expected = exact.gradients[field]
        own = 4 * torch.finfo(gradient.dtype).eps
        slack = (float32 * logits + own) * largest(expected) + float32 * factors[field]
        assert_as_accurate(f"gradient of {field}", gradient, peer.gradients[field], expected, slack)


def largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def assert_same(ours: Result, other: Result, tolerance: float = 1e-10) -> None:
    """Equal up to the rounding of float64 sums."""
    torch.testing.assert_close(ours.value, other.value, rtol=tolerance, atol=tolerance)
    for field, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[field], rtol=tolerance, atol=tolerance)
