"""Runs as guards see them: rows of metrics, made up."""

from __future__ import annotations

from typing import Any

HEALTHY = {
    "loss": 0.1,
    "teacher_kl": 0.6,
    "entropy": 0.14,
    "completions/mean_length": 13.5,
    "completions/truncated_fraction": 0.0,
    "completions/looping_fraction": 0.0,
    "sampler_mismatch/kl": 1e-9,
    "teacher_logprobs/mean": -0.7,
    "teacher_logprobs/std": 2.0,
    "advantages/top_share": 0.2,
}
STEPS = 12


def rows(**changes: Any) -> list[dict[str, float]]:
    """A run that is healthy but for what changes: `name__of__metric` gives its values, or a number for all steps, or None.

    A list is what the metric goes through; its values have equal parts of the run.
    """
    found = []
    for step in range(STEPS):
        row = dict(HEALTHY, step=step + 1)
        for name, values in changes.items():
            value = values[step * len(values) // STEPS] if isinstance(values, list) else values
            row[name.replace("__", "/")] = value
        found.append({name: value for name, value in row.items() if value is not None})
    return found
