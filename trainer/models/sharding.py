"""A sharded student as one model: what sampling, evaluation and saving need."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def name_layers(model: Any) -> None:
    """Leaves the classes of its layers, which FSDP shards as units, to a model: it may name others of its family."""
    has = {type(module).__name__ for module in model.modules()}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base._no_split_modules = [name for name in base._no_split_modules or [] if name in has] or None


class GatheredCopy:
    """A plain copy of a model that FSDP shards, with weights only while it is used.

    Sampling runs as many forward passes as it likes, at each process's own pace: none of them may wait for another
    process, as every forward pass of a sharded module does. Between uses the copy has no storage.
    """

    def __init__(self, model: nn.Module) -> None:
        empty: dict[int, object] = {}  # deepcopy takes what it finds here in place of a copy
        for parameter in model.parameters():
            ours = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
            ours.untyped_storage().resize_(0)
            empty[id(parameter)] = ours
        self.model = copy.deepcopy(model, empty).eval()

    @contextmanager
    def gathered(self, sharded: nn.Module) -> Iterator[None]:
        """With the weights of `sharded`, this model's original; every process takes part."""
        with torch.no_grad():
            for ours, theirs in zip(self.model.parameters(), sharded.parameters(), strict=True):
                ours.untyped_storage().resize_(ours.numel() * ours.element_size())
                ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        try:
            yield
        finally:
            self._empty()

    def _empty(self) -> None:
        for parameter in self.model.parameters():
            parameter.untyped_storage().resize_(0)
