"""The table of recipes/reasoning/smollm2: a real model, half-trained, that goes on in several ways."""

from __future__ import annotations

from typing import Any

from bench.lib.markdown import table
from bench.lib.report import read_recipe

LABELS = {
    "teacher": "SmolLM2, the teacher",
    "pruned": "less six layers",
    "half": "half-trained, the start",
    "whole": "`reverse_kl`",
    "sampled": "`policy_gradient`",
    "sft": "more SFT",
}
ACCURACIES = ("eval/accuracy_t0", "eval/accuracy")


def arms() -> str:
    """Of what has run: the first and the last step, the FLOPs, and the accuracies on the test problems."""
    report = read_recipe("reasoning/smollm2/results")
    runs = {run["arm"]: run for run in report["runs"]}
    rows = [
        [label, *_training(runs[name]), *_tested(runs[name]["test"])]
        for name, label in LABELS.items()
        if "test" in runs.get(name, {})
    ]
    header = ["", "steps", "loss", "teacher_kl", "FLOPs", "greedy, %", "T = 0.5, %"]
    conditions = (
        f"128 problems, ± standard errors, one seed. First → last step. FLOPs without those of writing a transcript: "
        f"{runs['writing']['flops']:.1e} each"
    )
    return table(header, rows, conditions, [report], "torch", "transformers")


TABLES = {"reasoning-smollm2": arms}


def _training(run: dict[str, Any]) -> list[str]:
    if "steps" not in run:
        return [""] * 4
    ends = (f"{values[0]:.2f} → {values[-1]:.2f}" if values else "" for values in (run["loss"], run["teacher_kl"]))
    return [str(run["steps"]), *ends, f"{run['flops']:.1e}"]


def _tested(found: dict[str, float]) -> list[str]:
    return [f"{100 * found[name]:.1f} ± {100 * found[f'{name}_se']:.1f}" for name in ACCURACIES]
