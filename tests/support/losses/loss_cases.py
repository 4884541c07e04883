"""The losses by name, each beside its definition, and the ways to call them, shared by the tests of the losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, NamedTuple, get_args

import pytest
import torch
from problem import HEAD_OPTIONS, TRAINABLE, Problem
from torch import Tensor

from fastkl import loss, reference
from fastkl.kernels.divergence.formula import Divergence

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


def pattern(message: str) -> str:
    """A regular expression for the parts of an error message, which " / " sets apart, in their order."""
    return ".*".join(map(re.escape, message.split(" / ")))


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
