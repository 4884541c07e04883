"""The tables of recipes/reasoning: how far each arm brings a student, at what cost, and who needs how much less."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

from bench.lib.markdown import Report, table, with_error
from bench.lib.report import counted, read_recipe

REPORT = "reasoning/results"
ARMS = {
    "sft": "more SFT",
    "sampled": "`policy_gradient`",
    "whole": "`reverse_kl`",
    "tail": "`top_k`, `sampled`",
    "rl": "RL",
    "shuffled": "… `control: shuffled`",
    "no_teacher": "… `control: no_teacher`",
    "batch_16": "… 16 prompts a step",
    "batch_256": "… 256 prompts a step",
    "substeps_4": "… 4 substeps",
}
ACCURACIES = {"greedy": "greedy", "sampled": "T = 1"}
SHARE = 0.9  # of the way from the start to the worse of two bests
LEAST = 0.05  # what has not gained so much has learned nothing
Run = dict[str, Any]


class Race(NamedTuple):
    """Two arms from one student, each with several numbers of prompts."""

    start: float
    runs: dict[str, list[Run]]
    key: str

    def best(self, arm: str) -> float:
        return max(run["test"][self.key][run["best"]] for run in self.runs[arm])

    def target(self) -> float:
        return self.start + SHARE * (min(map(self.best, self.runs)) - self.start)

    def flops(self, arm: str) -> float:
        """Of the numbers of prompts, the cheapest."""
        curves = ([(0.0, self.start), *zip(run["flops"], run["test"][self.key], strict=True)] for run in self.runs[arm])
        return min(flops for curve in curves if (flops := flops_to(curve, self.target())) is not None)


def arms() -> str:
    """Of each arm the accuracies at the checkpoint that validation chose, and the FLOPs until there."""
    report = read_recipe(REPORT)
    rows = []
    for setting in _settings(report):
        own = [run for run in report["runs"] if run["setting"] == setting]
        for name in ("teacher", "start"):
            runs = [run for run in own if run["arm"] == name]
            rows.append([setting, name, "", "", *(_percent([run["test"][key] for run in runs]) for key in ACCURACIES)])
            rows[-1] += [""] * 3
        for name, label in ARMS.items():
            for prompts in sorted({run["prompts"] for run in own if run["arm"] == name}):
                runs = [run for run in _shown(own, name) if run["prompts"] == prompts]
                rows.append([setting, label, f"{prompts:,}", *_arm(runs)] if runs else [])
    header = ["", "arm", "prompts", "rate", *(f"{text}, %" for text in ACCURACIES.values())]
    header += ["FLOPs", "T = 1 at the end, %", "teacher_kl, entropy"]
    most = counted(len({run["seed"] for run in report["runs"] if "seed" in run}), "seed")
    conditions = (
        f"550 problems. ± standard errors of at most {most}; without ± there is one. teacher_kl and entropy of step 1"
    )
    return table(header, [row for row in rows if row], conditions, [report], "torch", "transformers")


def factors() -> str:
    """How many times fewer FLOPs the one needs than the other, in each setting."""
    report = read_recipe(REPORT)
    pairs = [(one, other) for other in ("sft", "rl") for one in ("sampled", "whole")]
    rows = []
    for setting in _settings(report):
        own = [run for run in report["runs"] if run["setting"] == setting]
        for key, label in ACCURACIES.items():
            rows.append([setting, label, *(_factor(own, one, other, key) for one, other in pairs)])
    header = ["", "accuracy", *(f"{ARMS[one]} against {ARMS[other]}" for one, other in pairs)]
    conditions = "Geometric means of the seeds, in brackets the least and the most"
    return table(header, rows, conditions, [report], "torch", "transformers")


def rates() -> str:
    """What validation saw of each rate with seed 0: the best checkpoint's accuracy, the mean of greedy and sampled."""
    report = read_recipe(REPORT)
    settings = _settings(report)
    rows = []
    for arm in ("sft", "sampled", "whole", "tail", "rl"):
        cells = []
        for setting in settings:
            tried = [
                run for run in report["runs"] if (run["setting"], run["arm"], run.get("seed")) == (setting, arm, 0)
            ]
            few = min((run["prompts"] for run in tried), default=0)
            tried = sorted((run for run in tried if run["prompts"] == few), key=lambda run: run["rate"])
            cells.append(" / ".join(f"{run['rate']:g}: {_validated(run):.0f}" for run in tried))
        rows.append([ARMS[arm], *cells])
    header = ["rate: accuracy, %", *settings]
    return table(header, rows, "One seed, few prompts, 250 problems", [report], "torch", "transformers")


def flops_to(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """The FLOPs at which a curve first has this accuracy, by straight lines between its points; None: never."""
    if curve[0][1] >= accuracy:
        return curve[0][0]
    for (before, low), (after, high) in pairwise(curve):
        if high >= accuracy:
            return before + (after - before) * (accuracy - low) / (high - low)
    return None


TABLES = {"reasoning": arms, "reasoning-factors": factors, "reasoning-rates": rates}


def _settings(report: Report) -> list[str]:
    return list(dict.fromkeys(run["setting"] for run in report["runs"] if run.get("chosen")))


def _shown(runs: Iterable[Run], arm: str) -> list[Run]:
    return [run for run in runs if run["arm"] == arm and run["chosen"]]


def _arm(runs: list[Run]) -> list[str]:
    first = [
        fmean(run["first"][name] for run in runs) for name in ("teacher_kl", "entropy") if name in runs[0]["first"]
    ]
    return [
        f"{runs[0]['rate']:g}",
        *(_percent([run["test"][key][run["best"]] for run in runs]) for key in ACCURACIES),
        f"{fmean(run['flops'][run['best']] for run in runs):.1e}",
        _percent([run["test"]["sampled"][-1] for run in runs]),
        ", ".join(f"{value:.3f}" for value in first),
    ]


def _validated(run: Run) -> float:
    return 100 * fmean(run["validation"][key][run["best"]] for key in ACCURACIES)


def _percent(values: Sequence[float]) -> str:
    return with_error([100 * value for value in values], ".1f")


def _factor(runs: list[Run], one: str, other: str, key: str) -> str:
    """FLOPs of the other over those of the one, until both have gone most of the way to the worse of their bests."""
    races = list(_races(runs, one, other, key))
    if not races:
        return "–"
    gains = {arm: fmean(race.best(arm) - race.start for race in races) for arm in (one, other)}
    learning = [arm for arm in gains if gains[arm] >= LEAST]
    if len(learning) < len(gains):
        return f"only {ARMS[learning[0]]} learns" if learning else "neither learns"
    races = [race for race in races if race.target() > race.start]
    found = [race.flops(other) / race.flops(one) for race in races]
    spread = f" ({_times(min(found))} … {_times(max(found))})" if len(found) > 1 else ""
    return f"{_times(geometric_mean(found))}{spread} to {100 * fmean(race.target() for race in races):.0f} %"


def _times(factor: float) -> str:
    return f"{factor:.0f}" if factor >= 10 else f"{factor:.2g}"


def _races(runs: list[Run], one: str, other: str, key: str) -> Iterator[Race]:
    """Of each seed with which both have run."""
    for begin in (run for run in runs if run["arm"] == "start"):
        own = {arm: [run for run in _shown(runs, arm) if run["seed"] == begin["seed"]] for arm in (one, other)}
        if all(own.values()):
            yield Race(begin["test"][key], own, key)
