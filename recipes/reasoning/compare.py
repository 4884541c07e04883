"""More supervised fine-tuning, on-policy distillation and reinforcement learning of one student, by what they cost.

    python recipes/reasoning/compare.py

1. `fastkl sft`: the demo's teacher, and a student that has seen some of the right solutions.
2. The student goes on in four ways: sft.yaml, distill.yaml, distill_full.yaml, rl.yaml.
3. Held-out accuracy against all FLOPs since then: of sampling, of the teacher, of training.

Everything is kept in runs/reasoning and runs/demo: what is complete is not run again, what was interrupted goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

HERE, RUN = Path(__file__).parent, Path("runs/reasoning")
sys.path.insert(0, str(HERE.parent / "demo"))
from run import ENVIRONMENT, prepare  # noqa: E402

METHODS = {
    "sft": "more sft",
    "distill": "on-policy distillation, sampled tokens",
    "distill_full": "on-policy distillation, whole vocabulary",
    "rl": "reinforcement learning",
}
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
Curve = Sequence[tuple[float, float]]  # (FLOPs spent so far, held-out accuracy) at each evaluation


def main() -> None:
    prepare()
    run("sft", HERE.parent / "demo" / "teacher.yaml")
    run("sft", HERE / "student.yaml")
    for name in METHODS:
        run("sft" if name == "sft" else "distill", HERE / f"{name}.yaml")
    curves = {label: curve(_metrics(name)) for name, label in METHODS.items()}
    table = {label: {str(target): flops_to(points, target) for target in TARGETS} for label, points in curves.items()}
    result = {"curves": curves, "flops_to_accuracy": table}
    (RUN / "comparison.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(curves, RUN / "comparison.png")
    print(json.dumps(table, indent=1))


def run(command: str, config: Path) -> None:
    subprocess.run([sys.executable, "-m", "fastkl.cli", command, str(config)], env=ENVIRONMENT, check=True)


def curve(metrics: Sequence[dict[str, Any]]) -> Curve:
    """Evaluation is not counted, as it is no part of a method."""
    spent = accumulate(sum(v for name, v in row.items() if name.startswith("flops/")) for row in metrics)
    return [(flops, row["eval/accuracy"]) for flops, row in zip(spent, metrics, strict=True) if "eval/accuracy" in row]


def flops_to(points: Curve, accuracy: float) -> float | None:
    """FLOPs at the first evaluation with this accuracy; None if there is none."""
    return next((flops for flops, reached in points if reached >= accuracy), None)


def plot(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.6), layout="constrained")
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(
        xlabel="FLOPs of sampling, teacher and training", ylabel="held-out accuracy", xlim=(0, None), ylim=(0, 1.02)
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _metrics(name: str) -> list[dict[str, Any]]:
    lines = (RUN / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
