"""A loss on a head that the processes of a group have between them, and all that it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from loss_cases import LISTS, fused_output
from problem import TRAINABLE, Problem, make_problem
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastkl.loss import linear_list_logprobs, linear_ranks, linear_token_stats, linear_top_k

OF_IDS = ("weight", "bias", "teacher_weight", "teacher_bias")
TOKEN_STATS = "token_stats"  # no loss: what it gives is differentiated, all together
LIKELIEST = ("top", "list", "ranks")  # none either, and without gradients


class Case(NamedTuple):
    """A loss, and how many ids each process has."""

    name: str
    options: dict[str, Any]
    sizes: tuple[int, ...]
    needs: tuple[str, ...] = TRAINABLE
    lead: tuple[int, ...] = (6,)
    dtype: torch.dtype = torch.float64
    change: Callable[[Problem], Problem] | None = None  # of the whole problem

    def problem(self) -> Problem:
        p = make_problem(self.lead, sum(self.sizes), dtype=self.dtype)
        if (known := self.options.get("vocab_size")) is not None:  # the rest is padding
            p = p._replace(tokens=p.tokens.clamp(max=known - 1))
        return p if self.change is None else self.change(p)


def everything(case: Case, p: Problem, **options: Any) -> dict[str, Tensor]:
    """Values, metrics, by-products and gradients by name. An entry per token gets an upstream value of its own."""
    p = p.leaves(case.needs)
    if case.name in LIKELIEST:
        return _likeliest(case.name, p, **options)
    if case.name == TOKEN_STATS:
        return _token_stats(case, p, **options)
    weight_grad = torch.ones_like(p.weight) if "weight_grad" in options else None
    options = {**options, "weight_grad": weight_grad}
    with torch.set_grad_enabled(bool(case.needs)):
        output = fused_output(case.name, p, **options)
    found = {"loss": output.loss.detach(), **{f"metric {key}": metric for key, metric in output.metrics.items()}}
    if output.logprobs is not None:
        found["logprobs"] = output.logprobs
    if output.per_token is not None:
        found |= {f"per token {key}": row for key, row in output.per_token._asdict().items() if row is not None}
    if output.loss.requires_grad:
        upstream = torch.linspace(-1.0, 2.0, output.loss.numel(), dtype=output.loss.dtype)
        output.loss.backward(upstream.view_as(output.loss) if output.loss.dim() else None)
    return found | _gradients(case, p) | ({} if weight_grad is None else {"gradient weight": weight_grad})


def _likeliest(name: str, p: Problem, k: int = 4, **options: Any) -> dict[str, Tensor]:
    """Each list has ids of all processes, some of them twice, in no order, and padding."""
    if name == "top":
        return linear_top_k(p.hidden, p.weight, k, bias=p.bias, **options)._asdict()
    if name == "ranks":
        return {"ranks": linear_ranks(p.hidden, p.weight, p.tokens, bias=p.bias, **options)}
    places = torch.arange(p.tokens.numel() * k).reshape(*p.tokens.shape, k)
    ids = (places * 7 % 10).where(places % 5 > 0, -1)
    return {"logprobs": linear_list_logprobs(p.hidden, p.weight, ids, bias=p.bias, **options)}


def _token_stats(case: Case, p: Problem, **options: Any) -> dict[str, Tensor]:
    found = linear_token_stats(p.hidden, p.weight, p.tokens, bias=p.bias, **options)._asdict()
    for tensor in found.values():
        if tensor.requires_grad:
            tensor.backward(torch.linspace(-1.0, 2.0, tensor.numel()).to(tensor).view_as(tensor), retain_graph=True)
    return {name: tensor.detach() for name, tensor in found.items()} | _gradients(case, p)


def _gradients(case: Case, p: Problem) -> dict[str, Tensor]:
    tensors = {name: getattr(p, name) for name in case.needs}
    return {f"gradient {name}": t.grad for name, t in tensors.items() if t is not None and t.grad is not None}


def own_ids(case: Case, p: Problem, place: int) -> Problem:
    """The problem of one process: its rows of both heads; the last one has all that are left of a longer one.

    A teacher that is a list is made of the whole head.
    """
    first, last = sum(case.sizes[:place]), place == len(case.sizes) - 1
    stop = None if last else first + case.sizes[place]
    fields = [field for field in OF_IDS if case.name not in LISTS or not field.startswith("teacher")]
    return p._replace(**{f: getattr(p, f)[first:stop] for f in fields if getattr(p, f) is not None})


def of_processes(rank: int, count: int, cases: dict[str, Case]) -> dict[str, dict[str, Tensor] | str]:
    """What each case gives this process, which is one of the first that it is for; or the error it raised."""
    groups = {size: dist.new_group([*range(size)]) for size in range(2, count + 1)}
    found: dict[str, dict[str, Tensor] | str] = {}
    for key, case in cases.items():
        if rank < len(case.sizes):
            p, group = own_ids(case, case.problem(), rank), groups[len(case.sizes)]
            found[key] = attempted(lambda: everything(case, p, group=group, **case.options))  # noqa: B023  called now
    return found


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the head side by side; all else is the same on all processes, bit for bit."""
    found = {}
    for name, one in parts[0].items():
        others = [part[name] for part in parts]
        apart = name in ("gradient weight", "gradient bias")
        assert apart or all(torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0)) for other in others), name
        found[name] = torch.cat(others) if apart else one
    return found


def attempted(call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | str:
    try:
        return call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Those that this process calls while open, and the numbers that each one takes from it."""
    called: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(found: list[Tensor], own: Tensor, group: Any = None) -> None:
        called.append(("all_gather", own.numel()))
        gather(found, own, group)

    def all_reduce(tensor: Tensor, group: Any = None) -> None:
        called.append(("all_reduce", tensor.numel()))
        reduce(tensor, group=group)

    with patch.object(dist, "all_gather", all_gather), patch.object(dist, "all_reduce", all_reduce):
        yield called


def of_dtensors(
    rank: int, count: int, cases: dict[str, Case]
) -> dict[str, tuple[dict[str, Tensor], list[tuple[str, int]]]]:
    """The same with heads that are DTensors, split along the last dimension of a mesh, and the collectives.

    Gradients of the head are gathered.
    """
    found = {}
    for key, case in cases.items():
        p, shape = case.problem(), (count // len(case.sizes), len(case.sizes))
        mesh = init_device_mesh("cpu", shape if shape[0] > 1 else shape[1:])
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        fields = [field for field in OF_IDS if case.name not in LISTS or not field.startswith("teacher")]
        p = p._replace(**{field: distribute_tensor(getattr(p, field), mesh, placements) for field in fields})
        with collectives() as called:
            results = everything(case, p, **case.options)
        found[key] = {name: _whole(tensor, placements) for name, tensor in results.items()}, called
    return found


def _whole(tensor: Tensor, placements: list[Any]) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    assert list(tensor.placements) == placements
    whole: Tensor = tensor.full_tensor()
    return whole


# Changes of the whole problem. Functions of a module, so that a process can be given them.


def forbidden_on_the_second(p: Problem) -> Problem:
    """No id of the second of three processes can be emitted, by student or teacher, nor the target of a row."""
    bias, teacher_bias = p.bias.clone(), p.teacher_bias.clone()
    bias[5:7] = teacher_bias[5:7] = -torch.inf
    return p._replace(bias=bias, teacher_bias=teacher_bias, tokens=p.tokens.where((p.tokens < 5) | (p.tokens > 6), 8))


def large_logits(p: Problem) -> Problem:
    return p._replace(hidden=p.hidden * 3e3, teacher_hidden=p.teacher_hidden * 3e3)


def alike(p: Problem) -> Problem:
    """Student and teacher are one."""
    return p._replace(teacher_hidden=p.hidden, teacher_weight=p.weight, teacher_bias=p.bias)


def all_masked(p: Problem) -> Problem:
    return p._replace(mask=torch.zeros_like(p.mask))


def poisoned(p: Problem) -> Problem:
    """Masked rows hold NaN."""
    masked = ((p.mask == 0) | (p.tokens == -100))[..., None]
    assert bool(masked.any())
    return p._replace(hidden=p.hidden.masked_fill(masked, torch.nan))


def not_finite(p: Problem) -> Problem:
    """A student's NaN in a row that counts, and +inf in another."""
    hidden, rows = p.hidden.clone(), ((p.mask != 0) & (p.tokens != -100)).nonzero()[:2, 0]
    hidden[rows[0]], hidden[rows[1]] = torch.nan, torch.inf
    return p._replace(hidden=hidden)


def longer_teacher(p: Problem) -> Problem:
    """The teacher's head has more padding, all on the last process."""
    more = p.teacher_weight.new_ones(3, p.teacher_weight.shape[1])
    return p._replace(
        teacher_weight=torch.cat([p.teacher_weight, more]), teacher_bias=torch.cat([p.teacher_bias, more[:, 0]])
    )


def bad_teacher(p: Problem) -> Problem:
    """NaN in a row of the teacher's weight that the last process has."""
    weight = p.teacher_weight.clone()
    weight[-1, 0] = torch.nan
    return p._replace(teacher_weight=weight)


def other_tokens(p: Problem) -> Problem:
    """Not the same on every process."""
    return p._replace(tokens=p.tokens.clamp(min=0).roll(dist.get_rank()))


def tokens_on_the_first(p: Problem) -> Problem:
    return p if dist.get_rank() == 0 else p._replace(tokens=None)  # type: ignore[arg-type]


def other_hidden(p: Problem) -> Problem:
    return p._replace(hidden=p.hidden * (1 + dist.get_rank()))


def one_forbidden(p: Problem) -> Problem:
    """Of the ids of the first of three processes only one can be emitted."""
    bias = p.bias.clone()
    bias[1:5] = -torch.inf
    return p._replace(bias=bias)


def fewer_rows(p: Problem) -> Problem:
    n = len(p.tokens) - dist.get_rank()
    return Problem(*[t[:n] if name not in OF_IDS else t for name, t in zip(p._fields, p, strict=True)])
