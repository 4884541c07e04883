"""A loss on a head that the processes of a group have between them, and all that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from loss_cases import LISTS, TRAINABLE, Problem, fused_output, make_problem
from torch import Tensor

OF_IDS = ("weight", "bias", "teacher_weight", "teacher_bias")


class Case(NamedTuple):
    """A loss, and how many ids each process has."""

    name: str
    options: dict[str, Any]
    sizes: tuple[int, ...]
    needs: tuple[str, ...] = TRAINABLE
    lead: tuple[int, ...] = (6,)
    dtype: torch.dtype = torch.float64
    seed: int = 0
    change: Callable[[Problem], Problem] | None = None  # of the whole problem

    def problem(self) -> Problem:
        p = make_problem(self.lead, sum(self.sizes), dtype=self.dtype, seed=self.seed)
        if (known := self.options.get("vocab_size")) is not None:  # the rest is padding
            p = p._replace(tokens=p.tokens.clamp(max=known - 1))
        return p if self.change is None else self.change(p)


def everything(name: str, p: Problem, needs: tuple[str, ...], **options: Any) -> dict[str, Tensor]:
    """Values, metrics, by-products and gradients by name. An entry per token gets an upstream value of its own."""
    p = p.leaves(needs)
    output = fused_output(name, p, **options)
    found = {"loss": output.loss.detach(), **{f"metric {key}": metric for key, metric in output.metrics.items()}}
    if output.logprobs is not None:
        found["logprobs"] = output.logprobs
    if output.per_token is not None:
        found |= {f"per token {key}": row for key, row in output.per_token._asdict().items() if row is not None}
    if output.loss.requires_grad:
        size = output.loss.numel()
        output.loss.backward(torch.linspace(-1.0, 2.0, size, dtype=output.loss.dtype).reshape(output.loss.shape))
        found |= {f"gradient {key}": getattr(p, key).grad for key in needs if getattr(p, key) is not None}
    return found


def own_ids(case: Case, p: Problem, place: int) -> Problem:
    """The problem of one process: its rows of both heads. A teacher that is a list is made of the whole one."""
    first = sum(case.sizes[:place])
    fields = [field for field in OF_IDS if case.name not in LISTS or not field.startswith("teacher")]
    parts = {f: getattr(p, f)[first : first + case.sizes[place]] for f in fields if getattr(p, f) is not None}
    return p._replace(**parts)


def of_processes(rank: int, count: int, cases: dict[str, Case]) -> dict[str, dict[str, Tensor] | str]:
    """What each case gives this process, which is one of the first that it is for; or the error it raised."""
    groups = {size: dist.new_group([*range(size)]) for size in range(2, count + 1)}
    found: dict[str, dict[str, Tensor] | str] = {}
    for key, case in cases.items():
        if rank >= len(case.sizes):
            continue
        p = own_ids(case, case.problem(), rank)
        try:
            found[key] = everything(case.name, p, case.needs, group=groups[len(case.sizes)], **case.options)
        except (TypeError, ValueError) as error:
            found[key] = f"{type(error).__name__}: {error}"
    return found
