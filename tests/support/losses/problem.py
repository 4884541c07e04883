"""Everything that a loss may be given, at random."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl import reference

HEAD_OPTIONS = ("temperature", "logit_scale", "softcap")
TRAINABLE = ("hidden", "weight", "bias")


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
        shift = self._logprobs(**{k: v for k, v in options.items() if k in HEAD_OPTIONS}) - self._logprobs()
        behaviour = [self.sampler_logprobs + shift, self.teacher_logprobs + shift]
        sampler, teacher = (t.clamp(max=0.0).to(self.teacher_logprobs.dtype) for t in behaviour)
        return self._replace(sampler_logprobs=sampler, teacher_logprobs=teacher)

    def _logprobs(self, **options: Any) -> Tensor:
        p = self.double()
        return reference.logprobs(reference.logits(p.hidden, p.weight, p.bias, **options), p.tokens)

    def leaves(self, needs: tuple[str, ...] = TRAINABLE) -> Problem:
        """Detached copies, of which those named in `needs` require a gradient."""
        pairs = zip(self._fields, self, strict=True)
        return Problem(*[None if t is None else t.detach().clone().requires_grad_(f in needs) for f, t in pairs])


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
