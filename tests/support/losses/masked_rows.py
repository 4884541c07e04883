"""Garbage where a mask is 0: in everything that a loss may be given per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from loss_cases import DIVERGENCES, LISTS, reference_logits, teacher_list
from problem import Problem, make_problem
from torch import Tensor

GARBAGE = (torch.nan, torch.inf, -torch.inf)
Given = tuple[Problem, dict[str, Any]]  # a problem and options


def masked_problem(lead: tuple[int, ...] = (8,), *shape: int, **options: Any) -> tuple[Problem, Tensor]:
    """A problem, and which of its rows take no part [...]: some by the mask, some by ignore_index."""
    p = make_problem(lead, *shape, **options)
    place = torch.arange(p.tokens.numel()).reshape(lead)
    p = p._replace(
        mask=(place % 4 != 1).to(p.advantages.dtype), tokens=p.tokens.clamp(min=0).where(place % 4 != 2, -100)
    )
    return p, (p.mask == 0) | (p.tokens == -100)


def clean_and_dirty(name: str, p: Problem, out: Tensor, value: float) -> Iterator[tuple[str, Given, Given]]:
    """An argument of the loss called `name`, the problem as it is, and with `value` in that argument's rows `out`."""

    def dirty(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(out if tensor.shape == out.shape else out[..., None], value)

    for field in _fields(name):
        yield field, (p, {}), (p._replace(**{field: dirty(getattr(p, field))}), {})
    for option, tensor in _options(name, p).items():
        yield option, (p, {option: tensor}), (p, {option: dirty(tensor)})
    if name in DIVERGENCES:
        logits = _options(name, p)["teacher_logits"]
        one = logits.clone()
        one[..., 3].masked_fill_(out, value)
        yield "one of teacher_logits", (p, {"teacher_logits": logits}), (p, {"teacher_logits": one})


def _fields(name: str) -> tuple[str, ...]:
    if name in DIVERGENCES:
        return "hidden", "teacher_hidden"
    own = {
        "policy_gradient": ("advantages", "sampler_logprobs"),
        "entropy": ("advantages", "sampler_logprobs"),
        "reference_kl": ("advantages", "sampler_logprobs", "teacher_logprobs"),
        **dict.fromkeys(("sampled_reverse_kl", "sampled_tail"), ("sampler_logprobs", "teacher_logprobs")),
    }
    return "hidden", *own.get(name, ())


def _options(name: str, p: Problem) -> dict[str, Tensor]:
    if name in DIVERGENCES:
        return {"teacher_logits": reference_logits(p)[1].to(p.hidden.dtype)}
    if name in LISTS:
        baseline = {"tail_baseline": p.advantages} if name == "sampled_tail" else {}
        return {"teacher_logprobs": teacher_list(p)[1], **baseline}
    if name == "sampled_reverse_kl":
        return {"baseline": p.advantages, "env_advantages": p.advantages}
    return {}
