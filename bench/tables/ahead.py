"""The tables of recipes/ahead: the seconds of a step, with a stand-in and with vLLM, and what old samples teach."""

from __future__ import annotations

from typing import Any

from bench.lib.markdown import table
from bench.lib.report import read_recipe


def overlap() -> str:
    """Seconds of a step where sampling and training take set times."""
    report = read_recipe("ahead/overlap")
    found = {(row["sampling"], row["training"], row["steps_ahead"]): row["seconds"] for row in report["rows"]}
    rows = []
    for sampling, training in dict.fromkeys((row["sampling"], row["training"]) for row in report["rows"]):
        apart, at_once = (found[sampling, training, ahead] for ahead in (0, 1))
        each = (apart, sampling + training), (at_once, max(sampling, training))
        cells = [f"{seconds:.2f} (+{seconds - known:.2f})" for seconds, known in each]
        rows.append([f"{sampling:g}", f"{training:g}", *cells])
    header = ["sampling takes, s", "training takes, s", "a step at 0 ahead, s", "a step at 1 ahead, s"]
    said = (
        "In brackets what is above the sum of both, and above the longer one. Others used the machine at the same time"
    )
    return table(header, rows, said, [report])


def vllm() -> str:
    """Seconds of a step with vLLM, and of its parts."""
    report = read_recipe("ahead/vllm")
    parts = ("seconds", "waited", "sampling", "push", "training")
    rows = [
        [str(row["round"]), str(row["steps_ahead"]), *(f"{row[part]:.1f}" for part in parts), f"{row['load']:.0f}"]
        for row in report["rows"]
    ]
    header = ["round", "steps ahead", "a step, s", "waits for samples, s", "the server writes them, s"]
    header += ["hands over weights, s", "the rest, s", "load"]
    said = f"Medians of {report['rows'][0]['steps']} steps. The load is that of the whole machine, which has two cores"
    return table(header, rows, said, [report])


def learning() -> str:
    """Where runs end that sample so many steps ahead."""
    report = read_recipe("ahead/learning")
    groups: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["rate"], row["steps_ahead"]), []).append(row)
    rows = [
        [
            f"{rate:g}",
            str(ahead),
            *(" / ".join(f"{scale * row[name]:.{n}f}" for row in own) for name, scale, n in SHOWN),
        ]
        for (rate, ahead), own in groups.items()
    ]
    header = [
        "learning rate",
        "steps ahead",
        "`teacher_kl`, last 10 steps",
        "accuracy, %",
        "mismatch, nats",
        "largest ratio",
    ]
    said = f"A seed each, 1 / 2 / 3. The student begins at {report['rows'][0]['before']:.1%} accuracy"
    return table(header, rows, said, [report])


SHOWN = (("teacher_kl", 1, 3), ("accuracy", 100, 1), ("mismatch", 1, 3), ("ratio_max", 1, 1))
TABLES = {"ahead-overlap": overlap, "ahead-vllm": vllm, "ahead-learning": learning}
