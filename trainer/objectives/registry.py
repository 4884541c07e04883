"""The objectives by the name that `loss.objective` gives them. A new one is a file of its own and an entry here."""

from __future__ import annotations

from typing import Any

from fastkl.kernels.divergence.formula import DIVERGENCES
from fastkl.trainer.config.loss import LossConfig, ObjectiveName
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.objectives.base import Objective
from fastkl.trainer.objectives.divergence import FullDivergence
from fastkl.trainer.objectives.policy_gradient import PolicyGradient
from fastkl.trainer.objectives.sampled_tail import SampledTailDivergence
from fastkl.trainer.objectives.top_k import TopKDivergence
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Lists

OBJECTIVES: dict[ObjectiveName, type[Any]] = {
    "policy_gradient": PolicyGradient,
    "top_k": TopKDivergence,
    **dict.fromkeys(DIVERGENCES, FullDivergence),
}


def make_objective(loss: LossConfig, sampling: SamplingConfig, teachers: RoutedTeacher[Any] | None) -> Objective:
    """The objective that a config names."""
    objective: Objective = _kind(loss)(loss, sampling, teachers)
    return objective


def asked_lists(loss: LossConfig) -> Lists:
    """What the config's objective asks teachers for, beside the log-probs of tokens."""
    lists: Lists = _kind(loss).lists(loss)
    return lists


def teacher_passes(loss: LossConfig) -> int:
    """How often the config's objective has the teacher read a sample for its score."""
    passes: int = _kind(loss).teacher_passes(loss)
    return passes


def _kind(loss: LossConfig) -> type[Any]:
    kind = OBJECTIVES[loss.objective]
    return SampledTailDivergence if kind is TopKDivergence and loss.top_k_tail == "sampled" else kind
