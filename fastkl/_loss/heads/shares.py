"""A head whose rows several processes have between them: which ids are this one's.

There are two layouts. With `group=` each process gives its own rows of whatever has one for each id, as Megatron has it.
A DTensor that lies with `Shard(0)` on one dimension of its mesh, as torch's tensor parallelism makes it, says so itself.
FSDP 2 makes such tensors too, of processes that have other tokens each. So a DTensor is taken in pieces only where the
processes agree on the tokens, and gathered where they do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastkl._loss.heads.agreement import difference, differing, stated
from fastkl._loss.heads.operands import is_sharded, whole
from fastkl.kernels.options import Sparse
from fastkl.kernels.rows.parallel.share import Share, gathered

HEADS = ("weight", "student_weight")
OF_IDS = (*HEADS, "bias", "weight_grad", "teacher_weight", "teacher_bias", "teacher_logits")  # arguments with ids


class Layout(NamedTuple):
    """Of a DTensor."""

    rows: int
    mesh: Any
    placements: tuple[Any, ...]

    @property
    def apart(self) -> list[int]:
        """The dimensions of the mesh along which processes have different rows."""
        return [i for i, placement in enumerate(self.placements) if not placement.is_replicate()]


class Piece(NamedTuple):
    """The rows of a head that this process has, before any is left out."""

    share: Share
    rows: int
    layout: Layout | None  # of a head that is a DTensor; None: whatever is given is this process's own

    def rows_below(self, vocab_size: int | None) -> int:
        """How many of this process's ids are below `vocab_size`."""
        return _rows_below(vocab_size, self.share.first, self.rows)

    def cut(self, vocab_size: int | None) -> Share:
        """The share of the ids below `vocab_size`."""
        return self.share if vocab_size is None else self.share.cut(vocab_size)

    def own(self, tensor: Tensor, vocab_size: int | None) -> Tensor:
        """This process's rows of a head's weight or bias. The gradient of a DTensor keeps its layout."""
        count = self.rows_below(vocab_size)
        if self.layout is None:
            return tensor[:count]
        if is_sharded(tensor) and _layout(tensor) == self.layout:
            return _local(tensor)[:count]
        return whole(tensor)[self.share.first : self.share.first + count]

    def own_logits(self, logits: Tensor, vocab_size: int | None) -> Tensor:
        """This process's columns of logits [..., V]."""
        first = 0 if self.layout is None else self.share.first
        return logits[..., first : first + self.rows_below(vocab_size)]


def _rows_below(vocab_size: int | None, first: int, rows: int) -> int:
    """How many of the ids first … first + rows − 1 are below `vocab_size`."""
    return rows if vocab_size is None else min(max(vocab_size - first, 0), rows)


def is_part(piece: Piece | None) -> bool:
    """Are the tensors of a head those of this process alone? Not where they are DTensors."""
    return piece is not None and piece.layout is None


def find_piece(function: str, arguments: Mapping[str, Any]) -> Piece | None:
    """Of a call with these arguments. None: each process has the whole head, or gathers it.

    A collective of the group, before anything else: ValueError on all of its processes where they were not given the same.
    What is wrong with arguments that all have alike is said later, by all of them.
    """
    group, weight, layout = arguments["group"], _first_of(arguments, HEADS), None
    if isinstance(group, Piece):  # of the function that calls this one
        return group
    if group is None:
        layout = _shared_layout(weight, arguments["bias"]) if _can_be_shared(arguments) else None
        if layout is None:
            return None
        (dim,) = layout.apart
        group, place, rows = layout.mesh.get_group(dim), layout.mesh.get_local_rank(dim), _local_rows(weight)
    else:
        if torch.compiler.is_compiling():
            raise ValueError("group is given, which torch.compile does not take: call the loss outside of the graph")
        group = _process_group(group)
        place, rows = dist.get_rank(group), _ids_of(weight)
    theirs = rows if layout is not None else _teacher_ids(arguments, rows)
    own = stated(function, {**arguments, **_fits(arguments)}, OF_IDS)
    device = weight.device if isinstance(weight, Tensor) else None
    numbers = torch.tensor([place, rows, theirs, *own.numbers], dtype=torch.float64, device=device)
    found = gathered(group.group_name, numbers).cpu()  # a synchronisation on an accelerator
    if (name := differing(own, found[:, 3:])) is not None:
        if layout is not None:
            return None
        raise ValueError(
            f"the processes of group were given {difference(own, name, group)}; all of them take the same tokens and "
            f"options, and each its own rows of the head"
        )
    if layout is None:
        _refuse(weight, arguments)
    if rows < 0:
        return None  # no head: a check says so
    ordered = [(int(ours), int(others)) for _, ours, others in sorted(found[:, :3].tolist())]
    known = arguments.get("vocab_size")
    _check_rows(ordered, known if isinstance(known, int) else None)  # what is no number is refused later
    sizes = [ours for ours, _ in ordered]
    return Piece(Share(group.group_name, sum(sizes[:place]), sum(sizes), max(sizes)), rows, layout)


def _first_of(arguments: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if name in arguments:
            return arguments[name]
    return None


def _ids_of(weight: Any) -> int:
    """−1 for what is no head."""
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else -1


def _teacher_ids(arguments: Mapping[str, Any], rows: int) -> int:
    """How many ids the teacher has on this process; as many as the student where there is none, or none to be seen."""
    weight, logits = arguments.get("teacher_weight"), arguments.get("teacher_logits")
    if isinstance(weight, Tensor):
        return _ids_of(weight)
    return logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() > 0 else rows


def _fits(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Whether what has an entry for each id has one for each row of its head, in words."""
    pairs = {"bias": HEADS, "weight_grad": HEADS, "teacher_bias": ("teacher_weight",)}
    found = {}
    for name, heads in pairs.items():
        given, head = arguments.get(name), _first_of(arguments, heads)
        if isinstance(given, Tensor) and isinstance(head, Tensor):
            found[f"numbers of rows of {name}"] = "those of weight" if given.shape[:1] == head.shape[:1] else "others"
    return found


def _refuse(weight: Tensor, arguments: Mapping[str, Any]) -> None:
    """What goes with a whole head alone."""
    if is_sharded(weight) or is_sharded(arguments["bias"]):
        raise ValueError(
            "group is given but weight or bias is a DTensor: leave group out, its mesh says the group; or give "
            "weight.to_local()"
        )
    if isinstance(arguments.get("backward"), Sparse):
        raise ValueError(
            "group is given but backward is Sparse(…), whose sample of columns is drawn from all ids in one process: pass "
            'backward="exact"'
        )
    if is_sharded(arguments.get("teacher_weight")) or is_sharded(arguments.get("teacher_bias")):
        raise ValueError("group is given but the teacher's head is a DTensor: give teacher_weight.to_local()")
    if _is_function(arguments.get("teacher_logits")):
        raise ValueError(
            "group is given but teacher_logits is a function, which gives all ids: give teacher_hidden and this process's "
            "rows of teacher_weight, or this process's columns of the logits as a tensor"
        )


def _can_be_shared(arguments: Mapping[str, Any]) -> bool:
    """Whether a head that is a DTensor may be taken in pieces: one that may not is gathered."""
    sparse, every = isinstance(arguments.get("backward"), Sparse), arguments.get("skip_zero_rows", True)
    if torch.compiler.is_compiling() or sparse or not every:
        return False
    return arguments.get("backend", "auto") in ("auto", "torch") and not _is_function(arguments.get("teacher_logits"))


def _is_function(logits: Any) -> bool:
    return callable(logits) and not isinstance(logits, Tensor)


def _process_group(group: Any) -> Any:
    """The group itself, or that of a mesh of one dimension."""
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(
                f'group is a mesh of {group.ndim} dimensions; give the one of the vocabulary, as mesh["tp"] or '
                f'mesh.get_group("tp")'
            )
        group = group.get_group()
    if not hasattr(group, "group_name"):
        raise TypeError(
            f"group is {type(group).__name__}; expected a process group that this process is in, as "
            f"torch.distributed.new_group gives it, or a DeviceMesh of one dimension"
        )
    return group


def _layout(tensor: Any) -> Layout:
    return Layout(tensor.shape[0], tensor.device_mesh, tuple(tensor.placements))


def _shared_layout(weight: Any, bias: Any) -> Layout | None:
    """That of a DTensor whose rows lie on one dimension of its mesh, those of the bias alike; None for any other."""
    if not is_sharded(weight) or (bias is not None and (not is_sharded(bias) or _layout(bias) != _layout(weight))):
        return None
    from torch.distributed.tensor import Shard

    layout = _layout(weight)
    apart = layout.apart
    if len(apart) != 1 or layout.mesh.size(apart[0]) == 1 or type(layout.placements[apart[0]]) is not Shard:
        return None
    return layout if layout.placements[apart[0]].dim == 0 else None


def _local(tensor: Any) -> Tensor:
    """The rows of this process. Along dimensions where all have the same ones gradients are averaged, as by `whole`."""
    from torch.distributed.tensor import Partial

    placements = tuple(tensor.placements)
    gradient = [Partial("avg") if placement.is_replicate() else placement for placement in placements]
    found: Tensor = tensor.redistribute(placements=placements).to_local(grad_placements=gradient)
    return found


def _local_rows(weight: Any) -> int:
    rows: int = weight.to_local().shape[0]
    return rows


def _check_rows(rows: list[tuple[int, int]], vocab_size: int | None) -> None:
    """Ids of student and teacher on each process, in order: the same ones, as far as `vocab_size` keeps them."""
    first, ours = (0, 0), [own for own, _ in rows]
    if sum(ours) == 0:
        raise ValueError("weight has no rows on any process of the group: an empty vocabulary")
    for own, theirs in rows:
        kept = _rows_below(vocab_size, first[0], own)
        alike = theirs == own if vocab_size is None else kept == 0 or (first[0] == first[1] and theirs >= kept)
        if not alike:
            raise ValueError(
                f"the teacher has {[other for _, other in rows]} ids on the processes of group, and the student {ours}: "
                f"give each process the same ids of both; where the last one has more padding of one, pass "
                f"vocab_size=len(tokenizer)"
            )
        first = first[0] + own, first[1] + theirs
