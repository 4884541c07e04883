"""`loss.weights` of a step's samples: the product of all rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.losses.weights import FUNCTION, WeightRule, weight_rule
from fastkl.trainer.data.arrays import Array, end_to_end
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.errors import RunError, brief
from fastkl.trainer.objectives.weights.known import KnownTokens, as_known, as_record, known_tokens
from fastkl.trainer.objectives.weights.rules import Weigh, built_in
from fastkl.trainer.rollouts.grading.trusted import imported
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.records import Record, by_first

NOTHING = 1e-30  # of the step's largest weight: what is smaller is 0, also as a share of all of them in float32


class TokenWeights:
    """The rules of a config, ready to weigh samples.

    Raises:
        ConfigError: For a function that is not trusted or cannot be imported.
    """

    def __init__(self, config: LossConfig) -> None:
        rules = [weight_rule(text) for text in config.weights]
        self._compares = config.objective != "policy_gradient"
        self._rules = [(str(rule), _weigh(rule, config.trust_weights)) for rule in rules]
        self._needs_all = any(rule.needs_all for rule in rules)

    def set(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Writes `weights` of this process's samples of a step; returns the metrics `weights/*` of all samples.

        All processes call it. Each computes its own where all rules go by one sample at a time. Else the first process
        does, of what is known of all tokens: a rule may look at any, and of equal scores the first of the step count.
        """
        metrics = self._set_rules(samples) if self._rules else {}
        return metrics | (leave_out(samples) if self._compares else {})

    def _set_rules(self, samples: Sequence[Sample]) -> dict[str, float]:
        known = [known_tokens(sample) for sample in samples]
        if self._needs_all:
            places = [sample.place for sample in samples]
            found = [own.arrays[0] for own in by_first([as_record(own) for own in known], places, self._answer)]
        else:
            found = [own.numpy() for own in self._of(known)]
        found = self._added_up(found)
        for sample, own in zip(samples, found, strict=True):
            row = np.zeros(len(sample.ids))
            row[sample.loss_mask] = own
            sample.weights = row
        together = end_to_end(found, np.float64)
        sums = processes.add(
            {
                "samples": len(samples),
                "tokens": len(together),
                "weight": float(together.sum()),
                "selected": int(np.count_nonzero(together)),
            }
        )
        if not sums["samples"]:
            return {}
        count = max(1, sums["tokens"])
        return {"weights/mean": sums["weight"] / count, "weights/selected_fraction": sums["selected"] / count}

    def _answer(self, records: list[Record]) -> list[Record]:
        return [Record(None, [own.numpy()]) for own in self._of([as_known(record) for record in records])]

    def _of(self, samples: list[KnownTokens]) -> list[Tensor]:
        weights = [torch.ones(len(sample.tokens), dtype=torch.float64) for sample in samples]
        for name, weigh in self._rules:
            found = _checked(name, _found(name, weigh, samples), samples)
            weights = [before * own for before, own in zip(weights, found, strict=True)]
        return weights

    def _added_up(self, weights: list[Array]) -> list[Array]:
        """Without what is nothing beside the largest weight of all processes, if all of theirs can be added.

        Raises:
            RunError: On all of them, if they cannot.
        """
        own = end_to_end(weights, np.float64)
        with np.errstate(over="ignore"):
            parts = processes.gather([(float(own.sum()), float(own.max(initial=0.0)))])
        if not math.isfinite(sum(total for total, _ in parts)):
            rules = " and ".join(name for name, _ in self._rules)
            raise RunError(f"loss.weights: the weights of {rules} together are too large to add")
        least = NOTHING * max(largest for _, largest in parts)
        return [np.where(weight >= least, weight, 0.0) for weight in weights]


def leave_out(samples: Sequence[Sample]) -> dict[str, float]:
    """Gives the weight 0 to the tokens where a teacher with its own tokenizer has no distribution to compare.

    Returns the metric of how many it has, of all processes, which all call it; nothing where no teacher has its own.
    """
    own = [sample for sample in samples if len(sample.segments)]
    compared = [sample.compared for sample in own]
    counts = {"tokens": sum(s.loss_tokens for s in own), "compared": sum(int(each.sum()) for each in compared)}
    sums = processes.add(counts)
    if counts["compared"] < counts["tokens"]:
        for sample in samples:
            weights = sample.weights if len(sample.weights) else sample.loss_mask
            sample.weights = np.where(sample.compared, weights, 0.0)
    return {"alignment/compared_fraction": sums["compared"] / sums["tokens"]} if sums["tokens"] else {}


def needs_teacher_first(config: LossConfig) -> bool:
    """Whether the weights want the teacher's log-probs before the update."""
    return not all(weight_rule(text).is_blind for text in config.weights)


def needs_entropies_first(config: LossConfig) -> bool:
    """Whether the weights want the student's entropies before the update."""
    return any(weight_rule(text).reads_entropies for text in config.weights)


def _weigh(rule: WeightRule, trusted: bool) -> Weigh:
    if rule.name != FUNCTION:
        return built_in(rule)
    function: Weigh = imported("loss.weights", rule.path, "loss.trust_weights", trusted)
    return function


def _found(name: str, weigh: Weigh, samples: Sequence[KnownTokens]) -> Any:
    try:
        return weigh(samples)
    except Exception as error:  # whatever the user's code raises
        raise RunError(f"loss.weights: {name} failed: {brief(error)}") from error


def _checked(name: str, weights: Any, samples: Sequence[KnownTokens]) -> list[Tensor]:
    """What a rule gave, as tensors [n] float64.

    Raises:
        RunError: If it is not one finite number from 0 on for each counted token of each sample.
    """
    wanted = [len(sample.tokens) for sample in samples]
    try:
        found = [torch.as_tensor(own, dtype=torch.float64).detach().cpu() for own in weights]
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(
            f"loss.weights: {name} gave a {type(weights).__name__}, which is no list of numbers for each sample: {error}"
        ) from error
    shapes = [list(own.shape) for own in found]
    if shapes != [[count] for count in wanted]:
        raise RunError(
            f"loss.weights: {name} gave weights of the shapes {_few(shapes)} for samples of {_few(wanted)} counted tokens; "
            f"it must give one number for each"
        )
    for own in found:
        wrong = own[~(own.isfinite() & (own >= 0))]
        if len(wrong):
            raise RunError(
                f"loss.weights: {name} gave the weight {wrong[0].item()}; weights are finite and not negative"
            )
    return found


def _few(values: Sequence[object]) -> str:
    return f"[{', '.join(map(str, values[:4]))}{', …' if len(values) > 4 else ''}]"
