"""A second set of the student's trained weights, which follows the first: the teacher of `teacher.self` ema and synced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.models.sharding import gather_into, in_shards_as, let_go, own_part
from fastkl.trainer.runs import checkpoint
from fastkl.trainer.student import Student


class SecondWeights:
    """A model with weights θ' in place of those that are trained, θ. What is frozen in the student it shares with it.

    With LoRA that is a second adapter on the same base; otherwise it is a copy of the model. It stands outside the
    student: no optimizer, no gradient and no saved folder knows of it. θ' is θ at the beginning. Then with a rate r,
    after every optimizer step, θ' ← θ' + r (θ − θ'): after n steps it is (1 − r)ⁿ θ₀ + r Σ_k (1 − r)ⁿ⁻ᵏ θ_k. In 16 bits
    such small steps would be lost. So an average is in float32, and the model has it in the student's dtype.

    Where FSDP shards the student, each process has its shards of θ', and the model has weights only inside `gathered()`.

    Args:
        config: `self` is ema or synced.
        device: Of θ' and of the model.
    """

    def __init__(self, config: TeacherConfig, student: Student, device: torch.device) -> None:
        self._rate, self._every = config.ema_rate, config.sync_every
        self._sharded, self._open = student.sharded, False
        self.shares = False  # whether some weights are the student's own
        self._held: dict[str, _Weight] = {}  # by name in the student
        device = torch.empty(0, device=device).device  # with its index, as parameters have it
        places: dict[int, object] = {}  # deepcopy takes what it finds here in place of a copy
        named = student.plain.named_parameters()
        for (name, source), ours in zip(named, student.model.parameters(), strict=True):
            if ours.requires_grad or ours.device != device:
                self._held[name] = _Weight(source, ours, device, averaged=self._rate is not None, hollow=self._sharded)
                places[id(ours)] = self._held[name].shown
            else:
                places[id(ours)], self.shares = ours, True
        self.model: Any = copy.deepcopy(student.model, places).to(device).eval()

    def stepped(self) -> None:
        if self._rate is not None:
            self._move(self._rate)

    def updated(self, steps_done: int) -> None:
        if self._every is not None and steps_done % self._every == 0:
            self._move(1.0)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While open, the model has its current weights; entered and left by all processes together.

        Those that it shares with the student it has while that is gathered.
        """
        self._open = True
        if self._sharded:
            self._show()
        try:
            yield
        finally:
            self._open = False
            for weight in self._held.values() if self._sharded else ():
                let_go(weight.shown)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors on the first process, for a checkpoint; every process takes part."""
        return {name: checkpoint.whole(weight.in_shards()) for name, weight in self._held.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, weight in self._held.items():
            weight.held.copy_(own_part(checkpoint.like(weight.in_shards(), state[name])))
        self._changed()

    @torch.no_grad()
    def _move(self, rate: float) -> None:
        for weight in self._held.values():
            target = own_part(weight.source).to(weight.held)
            weight.held.lerp_(target, rate)
        self._changed()

    def _changed(self) -> None:
        if self._open or not self._sharded:
            self._show()

    def _show(self) -> None:
        for weight in self._held.values():
            if weight.shown is not weight.held:
                gather_into(weight.shown, weight.in_shards())


class _Weight:
    """θ' of one parameter of the student."""

    def __init__(self, source: Tensor, ours: Tensor, device: torch.device, averaged: bool, hollow: bool) -> None:
        """`source`: θ. `ours`: what the student's model has in its place."""
        dtype = torch.promote_types(source.dtype, torch.float32) if averaged else source.dtype
        own = own_part(source).to(device, dtype, copy=True)
        self.source = source
        if hollow or dtype != source.dtype:
            shown = torch.empty_like(ours, device=device)
            self.held, self.shown = own, nn.Parameter(shown, requires_grad=False)
            if hollow:
                let_go(self.shown)
            else:
                gather_into(self.shown, own)
        else:
            self.shown = nn.Parameter(own, requires_grad=False)
            self.held = self.shown

    def in_shards(self) -> Tensor:
        """θ' as one tensor, in shards where θ is."""
        return in_shards_as(self.held.detach(), self.source)
