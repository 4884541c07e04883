"""A teacher that was loaded here, on the student's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastkl.head import FusedCausalLM
from fastkl.trainer.config.optim import BatchConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.flops import cost_of, scoring_flops
from fastkl.trainer.models.loading import batch_layout
from fastkl.trainer.models.scoring import score


class LocalTeacher:
    """Scores with forward passes of a model (see `Teacher`)."""

    def __init__(self, fused: FusedCausalLM, batch: BatchConfig, temperature: float, device: torch.device) -> None:
        self.model, self._device = fused.model, device
        self._fused, self._max_tokens, self._temperature = fused, batch.max_tokens, temperature
        self._layout, self._cost = batch_layout(batch, self.model), cost_of(self.model)

    def score(self, samples: Sequence[Sample]) -> None:
        score(
            self._fused,
            samples,
            "teacher_logprobs",
            temperature=self._temperature,
            max_tokens=self._max_tokens,
            layout=self._layout,
            device=self._device,
        )

    def flops(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {"flops/teacher": scoring_flops(self._cost, samples)}
