"""Evaluation: sampled or greedy answers to held-out prompts, scored by a named function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.config.data import EvalConfig
from fastkl.trainer.data.prompts import EncodedPrompt, encode_prompts
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.models import checks
from fastkl.trainer.models.sizes.flops import Cost
from fastkl.trainer.rollouts.answers import Ask, answers_flops, answers_to
from fastkl.trainer.rollouts.grading.named import named_grader
from fastkl.trainer.rollouts.grading.statistics import best_of, mean, powers_below, standard_error
from fastkl.trainer.rollouts.single_turn import Responder

FLOPS = "eval/flops"
_STREAM = 1 << 31  # of random numbers: apart from those of the steps, which count up from seed · 1 000 003


@dataclass(frozen=True)
class Evaluation:
    """A set of held-out prompts at one temperature.

    Args:
        name: Of the set; "": that of `eval.data`.
        suffix: Of its metrics: which temperature, where it is not the first.
    """

    name: str
    suffix: str
    ask: Ask

    @property
    def setting(self) -> str:
        return f"eval.more.{self.name}" if self.name else "eval"

    @property
    def remedy(self) -> str:
        """Where a model has no room for it."""
        return checks.SHORTER.format(self.setting, f"{self.setting}.data")

    def summary(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics `eval/*` of the first answers, of which each has `score`, `tokens` and `truncated`."""
        prompts = [tuple(prompt.tokens) for prompt in self.ask.each[: len(answers)]]  # a row that stands twice is one
        scores = [answer["score"] for answer in answers]
        metrics = self._with_error("accuracy", scores, prompts)
        samples = self.ask.samples
        whole = range(0, len(scores) // samples * samples, samples)  # prompts that have all their answers
        for k in powers_below(samples) if whole else ():
            best = [best_of(scores[start : start + samples], k) for start in whole]
            metrics |= self._with_error(f"pass_at_{k}", best, [prompts[start] for start in whole])
        return metrics | {
            self._metric("mean_length"): mean([answer["tokens"] for answer in answers]),
            self._metric("truncated_fraction"): mean([answer["truncated"] for answer in answers]),
        }

    def accuracy(self, answers: Sequence[Mapping[str, Any]]) -> float:
        return mean([answer["score"] for answer in answers])

    def _with_error(self, stem: str, values: Sequence[float], prompts: Sequence[tuple[int, ...]]) -> dict[str, float]:
        name, error = self._metric(stem), standard_error(values, prompts)
        return {name: mean(values)} | ({} if error is None else {f"{name}_se": error})

    def _metric(self, stem: str) -> str:
        return f"eval/{self.name and f'{self.name}/'}{stem}{self.suffix}"


def load_evaluations(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> list[Evaluation]:
    """Each set of prompts with an answer each, at each temperature; none if the config names no data."""
    found = []
    for name, one in config.sets().items():
        own = f"eval.more.{name}" if name and one.grader else "eval"
        trusted = one.trust_grader or (own == "eval" and config.trust_grader)
        grader = named_grader(f"{own}.grader", one.grader or config.grader, trusted=trusted)
        prompts = encode_prompts(load_prompts(one.data), tokenizer, one.data)
        grader.check_rows(prompts, "evaluation")
        for number, temperature in enumerate(config.temperatures):
            samples = config.samples_per_prompt if temperature > 0 else 1
            ask = Ask(prompts, samples, temperature, one.max_new_tokens or config.max_new_tokens, grader)
            found.append(Evaluation(name, f"_t{temperature:g}" if number else "", ask))
    return found


def eval_rows(evaluations: Iterable[Evaluation]) -> dict[str, Sequence[EncodedPrompt]]:
    """The prompts of each set, by the setting that names them."""
    return {f"{one.setting}.data": one.ask.prompts for one in evaluations}


def check_eval_length(evaluations: Iterable[Evaluation], limits: dict[str, int | None]) -> None:
    """As `check_eval_room`, of models by the lengths of their contexts: before one is loaded."""
    for one in evaluations:
        checks.check_length(one.ask.prompts, one.ask.max_new_tokens, limits, one.remedy)


def check_eval_room(evaluations: Iterable[Evaluation], name: str, model: PreTrainedModel) -> None:
    """All prompts and full answers to them fit the context of the model called `name`."""
    for one in evaluations:
        checks.check_room(one.ask.prompts, one.ask.max_new_tokens, {name: model}, one.remedy)


def evaluate(
    evaluations: Iterable[Evaluation],
    responder: Responder,
    tokenizer: PreTrainedTokenizerBase,
    cost: Cost,
    seed: int,
    step: int,
) -> dict[str, float]:
    """Metrics `eval/*` of a run after a step: the same for the same weights, seed and step."""
    metrics, flops = dict[str, float](), 0.0
    for one in evaluations:
        answers = answers_to(one.ask.each, one.ask, responder, tokenizer, _STREAM + seed * 1_000_003 + step)
        metrics |= one.summary([vars(answer) for answer in answers])
        flops += answers_flops(cost, answers)
    return {**metrics, FLOPS: flops}
