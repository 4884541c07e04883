"""The public losses: value and gradients against `fastkl.reference` in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl import loss, reference
from fastkl._check.errors import ROUNDING, SCORES, Check, Measured, of_rows, of_tensor, of_values
from fastkl._check.problem import NAMES, Problem
from fastkl.kernels.problem import Backend

ENTROPY_COEF = 0.01
TAIL_BASELINE = 0.5
PER_TOKEN = ("advantages", "old_logprobs", "top_logprobs")
GRADIENTS = 1e-4  # of gradients whose operands were not rounded
CHUNKS = 2

Call = Callable[..., Tensor]  # of a problem and the options that all losses share


class Loss(NamedTuple):
    """A loss as a user calls it, and as `fastkl.reference` writes it per token."""

    name: str
    call: Call
    exact: Callable[[Problem, Tensor, Tensor], Tensor]  # problem, z, z_teacher -> [N]
    heads: int = 1  # of which logits are made


def _logprobs(p: Problem, **options: Any) -> Tensor:
    return (loss.linear_logprobs(p.hidden, p.weight, p.tokens, **options) * p.advantages).mean()


def _policy_gradient(p: Problem, **options: Any) -> Tensor:
    terms = p.tokens, p.advantages, p.old_logprobs
    return loss.policy_gradient_loss(p.hidden, p.weight, *terms, **options).loss


def _with_entropy(p: Problem, **options: Any) -> Tensor:
    return _policy_gradient(p, entropy_coef=ENTROPY_COEF, **options)


def _cross_entropy(p: Problem, **options: Any) -> Tensor:
    return loss.linear_cross_entropy(p.hidden, p.weight, p.tokens, **options).loss


def _top_k(p: Problem, **options: Any) -> Tensor:
    return loss.top_k_kl_loss(p.hidden, p.weight, p.top_ids, p.top_logprobs, **options).loss


def _sampled_tail(p: Problem, **options: Any) -> Tensor:
    """The sampler in the place of the teacher, too."""
    return loss.top_k_kl_loss(
        p.hidden,
        p.weight,
        p.top_ids,
        p.top_logprobs,
        tail="sampled",
        tokens=p.tokens,
        token_teacher_logprobs=p.old_logprobs,
        sampler_logprobs=p.old_logprobs,
        tail_baseline=TAIL_BASELINE,
        **options,
    ).loss


def _exact_sampled_tail(p: Problem, z: Tensor, _: Tensor) -> Tensor:
    likeliest, tokens = (p.top_ids, p.top_logprobs), (p.tokens, p.old_logprobs, p.old_logprobs)
    return reference.top_k_kl(z, *likeliest) + reference.sampled_tail(z, *likeliest, *tokens, TAIL_BASELINE)


def _divergence(function: Callable[..., loss.LossOutput]) -> Call:
    return lambda p, **options: function(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, **options).loss


def _exact_policy_gradient(p: Problem, z: Tensor, _: Tensor) -> Tensor:
    return reference.policy_gradient(reference.logprobs(z, p.tokens), p.advantages, p.old_logprobs)


LOSSES = (
    Loss("log-probs", _logprobs, lambda p, z, _: reference.logprobs(z, p.tokens) * p.advantages),
    Loss("policy gradient", _policy_gradient, _exact_policy_gradient),
    Loss(
        "policy gradient, entropy",
        _with_entropy,
        lambda p, z, q: _exact_policy_gradient(p, z, q) - ENTROPY_COEF * reference.entropy(z),
    ),
    Loss("cross-entropy", _cross_entropy, lambda p, z, _: reference.cross_entropy(z, p.tokens)),
    Loss("top-k KL", _top_k, lambda p, z, _: reference.top_k_kl(z, p.top_ids, p.top_logprobs)),
    Loss("top-k KL, sampled tail", _sampled_tail, _exact_sampled_tail),
    Loss("reverse KL", _divergence(loss.reverse_kl_loss), lambda _, z, q: reference.reverse_kl(z, q), 2),
    Loss("forward KL", _divergence(loss.forward_kl_loss), lambda _, z, q: reference.forward_kl(z, q), 2),
    Loss("JSD", _divergence(loss.jsd_loss), lambda _, z, q: reference.jsd(z, q), 2),
)


def checks(problem: Problem, dtype: torch.dtype, device: str, backend: Backend) -> Iterator[Check]:
    """Each loss, with a trained head, in several chunks."""
    for one in LOSSES:
        yield _check(one, problem.to(dtype, device), NAMES[dtype], backend)


def value_and_gradients(call: Call, p: Problem, trained: bool, **options: Any) -> tuple[Tensor, ...]:
    """The loss, and its gradients by the hidden states and by the weight if that is `trained`."""
    hidden, weight = p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_(trained)
    value = call(p._replace(hidden=hidden, weight=weight), **options)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight) if trained else (hidden,))


def _check(one: Loss, p: Problem, variant: str, backend: Backend) -> Check:
    kernel = f"loss: {one.name}"
    options = {"backend": backend, "chunk_size": -(-p.hidden.shape[0] // CHUNKS)}

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            alone = one.call(p, **options)
        return alone, *value_and_gradients(one.call, p, trained=True, **options)

    def measure(found: tuple[Tensor, ...]) -> list[Measured]:
        alone, value, hidden_gradient, weight_gradient = found
        expected, exact_hidden, exact_weight = _exact(one, p)
        bound = GRADIENTS + ROUNDING[p.hidden.dtype]
        return [
            Measured(kernel, "value", max(of_values(v, expected) for v in (alone, value)), SCORES),
            Measured(kernel, "gradient of hidden", of_rows(hidden_gradient, exact_hidden), bound),
            Measured(kernel, "gradient of weight", of_tensor(weight_gradient, exact_weight), bound),
        ]

    return Check((kernel,), variant, run, measure)


def _exact(one: Loss, p: Problem) -> tuple[Tensor, ...]:
    """The same in float64, on the CPU."""
    p = p.to(torch.float64, "cpu")
    p = p._replace(**{name: getattr(p, name).double() for name in PER_TOKEN})

    def call(p: Problem) -> Tensor:
        z_teacher = reference.logits(p.teacher_hidden, p.teacher_weight)
        return one.exact(p, reference.logits(p.hidden, p.weight), z_teacher).mean()

    return value_and_gradients(call, p, trained=True)
