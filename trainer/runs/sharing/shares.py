"""Which process has which samples of a step: the work is shared out evenly, optimizer step by optimizer step."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from fastkl.trainer.data.samples import Sample
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.records import gather_arrays
from fastkl.trainer.runs.sharing.samples import move_samples


def share_out(samples: Sequence[Sample], work: Sequence[float], substeps: int) -> list[Sample]:
    """This process's samples of a step, in the order of their places: most of those that are here, and some others.

    First it numbers the samples of all processes anew, with `place`, in the order of their places so far. All processes
    call it. `work` and `substeps`: as `shares` has them.
    """
    parts = gather_arrays(np.array([[sample.place for sample in samples], work], np.float64).T)
    places, known = np.concatenate(parts).T
    order = places.argsort(kind="stable")
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]
    found = shares(known[order].tolist(), owners.tolist(), len(parts), substeps)
    new, before = order.argsort(kind="stable"), sum(len(part) for part in parts[: processes.rank()])
    for sample, place in zip(samples, new[before : before + len(samples)].tolist(), strict=True):
        sample.place = place
    moved = move_samples(samples, [found[sample.place] for sample in samples])
    return sorted(moved, key=lambda sample: sample.place)


def shares(work: Sequence[float], owners: Sequence[int], count: int, substeps: int = 1) -> list[int]:
    """The process of each sample, so that each process has about the same to do in each optimizer step.

    Args:
        work: Of each sample of a step, in the order of their places.
        owners: The processes that have them: see `balanced`.
        count: How many processes there are.
        substeps: Optimizer steps of a step: of n, the i-th has the places i, i + n, i + 2 n …
    """
    found = list(owners)
    for first in range(substeps):
        found[first::substeps] = balanced(work[first::substeps], owners[first::substeps], count)
    return found


def balanced(work: Sequence[float], owners: Sequence[int], count: int) -> list[int]:
    """The process of each sample: the owners' own, as far as that is even.

    The busiest process gives the one with the least work the sample that brings both nearest together, until no sample
    brings them nearer: then they are apart by no more than the busiest's smallest sample, and the busiest has at most
    2 − 2 / (count + 1) times the least that is possible (Finn and Horowitz, "A Linear Time Approximation Algorithm for
    Multiprocessor Scheduling", 1979). Work is taken as whole numbers.
    """
    found = list(owners)
    own: list[list[tuple[int, int]]] = [[] for _ in range(count)]  # in ascending order of the work
    for pair in sorted((int(size), place) for place, size in enumerate(work)):
        own[found[pair[1]]].append(pair)
    loads = [sum(size for size, _ in pairs) for pairs in own]
    while True:
        busiest, idlest = (choose(range(count), key=loads.__getitem__) for choose in (max, min))
        gap = loads[busiest] - loads[idlest]
        middle = bisect.bisect_left(own[busiest], (gap // 2, -1))
        near = [pair for pair in own[busiest][max(0, middle - 1) : middle + 1] if 0 < pair[0] < gap]
        if not near:
            return found
        moved = min(near, key=lambda pair: abs(2 * pair[0] - gap))
        own[busiest].remove(moved)
        bisect.insort(own[idlest], moved)
        loads[busiest], loads[idlest] = loads[busiest] - moved[0], loads[idlest] + moved[0]
        found[moved[1]] = idlest
