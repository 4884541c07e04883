"""Which ids of a vocabulary a process has, and the collectives of the group whose processes have the others."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch import Tensor


class Share(NamedTuple):
    """The ids first … first + V − 1 of a group's vocabulary, for a weight of V rows. Plain data: operators take it."""

    group: str  # the name of the process group
    first: int
    vocabulary: int  # ids of all processes
    most: int  # of the process that has the most ids: chunks are made for it, alike on all

    def cut(self, vocabulary: int) -> Share:
        """The same without the ids from `vocabulary` on."""
        return self._replace(vocabulary=vocabulary, most=min(self.most, vocabulary))


def gathered(group_name: str, numbers: Tensor) -> Tensor:
    """The tensors of one shape that all processes of a group have, [processes, ...], in the order of their ranks."""
    group = _group(group_name)
    found = numbers.new_empty(dist.get_world_size(group), *numbers.shape)
    dist.all_gather(list(found.unbind(0)), numbers.contiguous(), group)
    return found


def add_up(share: Share, tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors of one shape, in place."""
    dist.all_reduce(tensor, group=_group(share.group))
    return tensor


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))
