"""The table of recipes/reasoning/smollm2: a real model, half-trained, that goes on in several ways."""

from __future__ import annotations

from typing import Any

from bench.lib.markdown import table
from bench.lib.report import read_recipe

BEGINS = {"teacher": "the teacher", "pruned": "SmolLM2 less six layers", "half": "half-trained, the start"}
ARMS = {"whole": "`reverse_kl`", "sampled": "`policy_gradient`", "sft": "more SFT"}
ACCURACIES = ("eval/accuracy_t0", "eval/accuracy")
Run = dict[str, Any]


def arms() -> str:
    """Each arm at each of its rates: the best checkpoint on validation, and of the chosen rate on the test problems too."""
    report = read_recipe("reasoning/smollm2/results")
    runs = report["runs"]
    begins = {run["arm"]: run for run in runs if run["arm"] in BEGINS}
    rows = [[BEGINS[name], "", "", "", "", "", *_tested(begins[name])] for name in BEGINS if "test" in begins[name]]
    rows += [_row(run, label) for name, label in ARMS.items() for run in runs if run["arm"] == name]
    header = ["", "rate", "seed", "steps", "FLOPs", "validation, T = 1, %", "test, greedy, %", "test, T = 1, %"]
    writing = next(run for run in runs if run["arm"] == "writing")
    conditions = (
        "64 validation problems, 256 test problems, ± standard errors. Steps and FLOPs up to the best on validation.\n"
        f"FLOPs of SFT with those of writing what it read: {writing['flops']:.1e} a transcript"
    )
    return table(header, rows, conditions, [report], "torch", "transformers")


TABLES = {"reasoning-smollm2": arms}


def _row(run: Run, label: str) -> list[str]:
    best, last = run["curve"][run["best"]], run["curve"][-1]
    seen = f"{100 * best['sampled']:.1f} ± {100 * best['sampled_se']:.1f}"
    steps = f"{best['step']} of {last['step']}"
    return [label, f"{run['rate']:g}", str(run["seed"]), steps, f"{best['flops']:.1e}", seen, *_tested(run)]


def _tested(run: Run) -> list[str]:
    found = run.get("test")
    return [f"{100 * found[name]:.1f} ± {100 * found[f'{name}_se']:.1f}" if found else "" for name in ACCURACIES]
