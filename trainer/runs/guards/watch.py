"""A run under watch: each step is looked at. What is found is said once and counted in the metrics, and may end the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fastkl.trainer.config.guards import GuardsConfig
from fastkl.trainer.errors import RunError
from fastkl.trainer.runs.guards.evaluations import Evaluated, best_of, evaluations
from fastkl.trainer.runs.guards.rules import RULES, Facts, Seen

PREFIX = "guards/"
IS_STEP = "loss"  # a metric that every step has, and the evaluation before the first has not


class GuardStop(RunError):
    """A guard that is set to stop has ended the run, with a checkpoint."""

    exit_status = 3


class Finding(NamedTuple):
    """What a rule found in a step."""

    rule: str
    text: str
    stops: bool
    is_new: bool  # no earlier step had it


class Looked(NamedTuple):
    """What came of looking at a row of metrics."""

    metrics: dict[str, float]  # to be added to it
    findings: list[Finding]


class Watch:
    """What is known of a run, step by step. All of it stands in metrics.jsonl, so that a resumed run knows as much.

    Args:
        rows: Those that are there already.
    """

    def __init__(self, config: GuardsConfig, facts: Facts, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        self._config, self._facts = config, facts
        self._steps = [row for row in rows if IS_STEP in row]
        self._evaluations = evaluations(rows)
        self._said = {name.removeprefix(PREFIX) for row in rows for name in row if name.startswith(PREFIX)}

    def look(self, step: int, metrics: Mapping[str, float]) -> Looked:
        """Looks at a step, or at the evaluation before the first."""
        row = {"step": step, **metrics}
        self._evaluations += evaluations([row])
        findings = []
        if IS_STEP in row:
            self._steps.append(row)
            findings = list(self._find(Seen(self._steps, self._evaluations, self._facts, self._config)))
        self._said |= {finding.rule for finding in findings}
        return Looked({f"{PREFIX}{finding.rule}": 1.0 for finding in findings}, findings)

    @property
    def best(self) -> Evaluated | None:
        """The best evaluation up to now."""
        return best_of(self._evaluations)

    def _find(self, seen: Seen) -> Iterator[Finding]:
        for rule in RULES:
            action = rule.action(self._config)
            text = None if action == "off" else rule.find(seen)
            if text is not None:
                yield Finding(rule.name, f"{text}. {rule.advice}", action == "stop", rule.name not in self._said)
