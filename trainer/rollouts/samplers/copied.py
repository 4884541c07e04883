"""Sampling from a copy of the student in another dtype: half the memory traffic, where its own weights are float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.samplers.sampler import Sampler
from fastkl.trainer.student import Student


class CopySampler:
    """Samples from the student's weights, rounded to `dtype` once after each update.

    What it samples from is another distribution than the student's, by as much as the weights and the arithmetic are
    rounded. The log-probs are its own: an importance ratio against them is exact.

    Args:
        student: Whole now, and whenever `sample` is called.
        dtype: Of the copy's parameters; buffers, such as rotary frequencies, stay as they are.
        sampler: Makes the sampler of a model.
    """

    shared = True

    def __init__(self, student: Student, dtype: torch.dtype, sampler: Callable[[nn.Module], Sampler]) -> None:
        self._student = student
        self._version = student.version  # of the weights that the copy has
        self._model = rounded(student.model, dtype)
        self._sampler = sampler(self._model)

    def refresh(self) -> None:
        """Nothing to do: `sample` looks whether the student has changed."""

    def sample(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        sampler = self._current()
        return sampler.sample(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    @torch.no_grad()
    def _current(self) -> Sampler:
        """The sampler of the copy, which has the student's current weights."""
        if self._version != self._student.version:
            for our, their in zip(self._model.parameters(), self._student.model.parameters(), strict=True):
                our.copy_(their)
        self._version = self._student.version
        return self._sampler


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model for inference with parameters in `dtype`; there is never a second one in the model's own."""
    made: dict[int, object] = {}  # deepcopy takes what it finds here in place of a copy
    for parameter in model.parameters():
        made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
    result: Any = copy.deepcopy(model, made).eval()
    base = result.get_base_model() if hasattr(result, "get_base_model") else result
    base.config.dtype = dtype  # in which the engine makes its cache
    return cast(nn.Module, result)
