"""What travels between processes: records, of a small head and of arrays, and sums. Arrays go as bytes, by collectives.

Every function here is called by all processes, at the same point of the run. With one process nothing is copied.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.runs import processes


class Record(NamedTuple):
    """Something that travels."""

    head: Any
    """A few numbers or words, which are pickled."""
    arrays: list[Array]


def move(records: Sequence[Record], to: Sequence[int]) -> list[Record]:
    """Gives each record to a process: those that come here, in the order of the processes that they come from."""
    if processes.count() == 1:
        return list(records)
    by_target: list[list[Record]] = [[] for _ in range(processes.count())]
    for record, target in zip(records, to, strict=True):
        by_target[target].append(record)
    staying, by_target[processes.rank()] = by_target[processes.rank()], []
    outgoing = [pack(part) if part else (_NO_BYTES, _NO_BYTES) for part in by_target]
    incoming = zip(*(_swapped([part[half] for part in outgoing]) for half in (0, 1)), strict=True)
    parts = [unpack(heads, arrays) if len(heads) else [] for heads, arrays in incoming]
    parts[processes.rank()] = staying
    return [record for part in parts for record in part]


def gather(records: Sequence[Record]) -> list[Record]:
    """The processes' records end to end, on every process."""
    if processes.count() == 1:
        return list(records)
    incoming = zip(*(gather_arrays(half) for half in pack(records)), strict=True)
    return [record for heads, arrays in incoming for record in unpack(heads, arrays)]


def by_first(
    mine: Sequence[Record], places: Sequence[int], function: Callable[[list[Record]], Sequence[Record]]
) -> list[Record]:
    """What a function makes of all processes' records, of each another one. It runs on the first process alone.

    The function sees them in the order of their places; what it raises, all raise. Here come those of this process.
    """
    rank = processes.rank()
    sent = [Record((places[i], rank, i, record.head), record.arrays) for i, record in enumerate(mine)]
    there = sorted(move(sent, [0] * len(sent)), key=lambda record: record.head[:3])
    known = [Record(record.head[3], record.arrays) for record in there]
    made = processes.raise_together(lambda: function(known) if known else [])
    answers = [Record((asked.head[2], own.head), own.arrays) for asked, own in zip(there, made, strict=True)]
    back = sorted(move(answers, [asked.head[1] for asked in there]), key=lambda record: record.head[0])
    return [Record(record.head[1], record.arrays) for record in back]


def gather_arrays(mine: Array) -> list[Array]:
    """The processes' arrays [n, …], each of its own length, on every process."""
    if processes.count() == 1:
        return [mine]
    device, flat = _device(), torch.from_numpy(np.ascontiguousarray(mine).reshape(-1).view(np.uint8))
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(processes.count())]
    dist.all_gather(sizes, torch.tensor([len(flat)], device=device))
    lengths = [int(size) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(flat)] = flat
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    parts = [part.cpu().numpy()[:length] for part, length in zip(found, lengths, strict=True)]
    return [part.view(mine.dtype).reshape(-1, *mine.shape[1:]) for part in parts]


def sum_arrays(mine: Array) -> Array:
    """The sum of the processes' arrays, which have one shape."""
    if processes.count() == 1:
        return mine
    total = torch.tensor(mine, device=_device())
    dist.all_reduce(total)
    found: Array = total.cpu().numpy()
    return found


_NO_BYTES = np.empty(0, np.uint8)


def pack(records: Sequence[Record]) -> tuple[Array, Array]:
    """On the way: heads with the dtypes and shapes of the arrays, and the arrays, both as bytes."""
    heads = [(record.head, [(array.dtype.str, array.shape) for array in record.arrays]) for record in records]
    arrays = [np.ascontiguousarray(array) for record in records for array in record.arrays]
    flat = [arrays[place].reshape(-1).view(np.uint8) for place in _widest_first([a.itemsize for a in arrays])]
    return np.frombuffer(pickle.dumps(heads), np.uint8).copy(), np.concatenate([_NO_BYTES, *flat])


def unpack(heads: Array, flat: Array) -> list[Record]:
    """The records that were packed; their arrays are views."""
    read = pickle.loads(heads.tobytes())
    layouts = [(np.dtype(dtype), shape) for _, arrays in read for dtype, shape in arrays]
    found: dict[int, Array] = {}
    start = 0
    for place in _widest_first([dtype.itemsize for dtype, _ in layouts]):
        dtype, shape = layouts[place]
        end = start + math.prod(shape) * dtype.itemsize
        found[place], start = flat[start:end].view(dtype).reshape(shape), end
    remaining = (found[place] for place in range(len(layouts)))
    return [Record(head, [next(remaining) for _ in arrays]) for head, arrays in read]


def _widest_first(widths: Sequence[int]) -> list[int]:
    """In which order arrays stand end to end, so that each begins where its dtype may."""
    return sorted(range(len(widths)), key=lambda place: -widths[place])


def _swapped(parts: Sequence[Array]) -> list[Array]:
    """Of bytes for each process, those from each."""
    device, sent = _device(), [len(part) for part in parts]
    coming = torch.empty(len(parts), dtype=torch.long, device=device)
    dist.all_to_all_single(coming, torch.tensor(sent, device=device))
    lengths: list[int] = coming.tolist()
    found = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
    dist.all_to_all_single(found, torch.from_numpy(np.concatenate(parts)).to(device), lengths, sent)
    return [part.numpy().copy() for part in found.cpu().split(lengths)]  # each begins where any dtype may


def _device() -> torch.device:
    """Where the collectives of the run's group take tensors."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend() in ("gloo", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
