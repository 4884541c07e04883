"""More supervised fine-tuning, on-policy distillation and reinforcement learning of one student, by what they cost.

    python recipes/reasoning/compare.py tiny        # models of the demo, sums of three digits
    python recipes/reasoning/compare.py smollm2     # SmolLM2 and three tasks; recipes/smollm2/make.py says what to install

1. A teacher, and a student that has seen a few solutions.
2. The student goes on in several ways: the other configs of the folder.
3. Held-out accuracy against all FLOPs since then: of sampling, of the teacher, of training.

Everything is kept in runs/reasoning: what is complete is not run again, what was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastkl.trainer.runs.files import read_jsonl

HERE, RUNS = Path(__file__).parent, Path("runs/reasoning")
METHODS = {
    "sft": "more sft",
    "distill": "on-policy distillation, sampled tokens",
    "distill_full": "on-policy distillation, whole vocabulary",
    "rl": "reinforcement learning",
}
TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
Curve = Sequence[tuple[float, float]]  # (FLOPs spent so far, held-out accuracy) at each evaluation


def main() -> None:
    if sys.argv[1:] not in [[name] for name in PREPARE]:
        sys.exit(f"usage: python recipes/reasoning/compare.py {'|'.join(PREPARE)}")
    configs, runs = HERE / sys.argv[1], RUNS / sys.argv[1]
    methods = {name: label for name, label in METHODS.items() if (configs / f"{name}.yaml").exists()}
    PREPARE[sys.argv[1]]()
    for name in ("student", *methods):
        run("sft" if name in ("student", "sft") else "distill", configs / f"{name}.yaml")
    curves = {}
    for name, label in methods.items():
        metrics = read_jsonl(runs / name / "metrics.jsonl")
        curves[label] = curve(metrics, writing_flops(configs) if name == "sft" else 0.0)
    table = {label: {str(target): flops_to(points, target) for target in TARGETS} for label, points in curves.items()}
    result = {"curves": curves, "flops_to_accuracy": table}
    (runs / "comparison.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(curves, runs / "comparison.png")
    print(json.dumps(table, indent=1))


def run(command: str, config: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "fastkl.cli", command, config], env=environment, check=True)


def prepare_tiny() -> None:
    """The demo's data, models and teacher."""
    os.environ["OMP_NUM_THREADS"] = "1"  # models this small leave nothing for a second thread to do
    sys.path.insert(0, str(HERE.parent / "demo"))
    from run import prepare

    prepare()
    run("sft", HERE.parent / "demo" / "teacher.yaml")


def prepare_smollm2() -> None:
    """SmolLM2 as the teacher, which learns from worked solutions; itself less six layers reads what the teacher writes."""
    sys.path.insert(0, str(HERE / "smollm2"))
    from tasks import write_data

    data = RUNS / "smollm2" / "data"
    subprocess.run([sys.executable, HERE.parent / "smollm2" / "make.py"], check=True)
    write_data(data)
    run("sft", HERE / "smollm2" / "teacher.yaml")
    if not (data / "transcripts.jsonl").exists():
        run("eval", HERE / "smollm2" / "transcripts.yaml")


def writing_flops(configs: Path) -> float:
    """What it costs the teacher to write what a step of sft.yaml reads; nothing, where a program has written it."""
    if not (configs / "transcripts.yaml").exists():
        return 0.0
    from fastkl.trainer.commands.command_line import parse
    from fastkl.trainer.data.prompts import encode_prompts, given_samples
    from fastkl.trainer.data.sources import load_prompts
    from fastkl.trainer.models.pretrained import load_model, load_tokenizer
    from fastkl.trainer.models.sizes.flops import cost_of, sampling_flops

    _, sft = parse(["sft", str(configs / "sft.yaml")])
    _, written = parse(["eval", str(configs / "transcripts.yaml")])
    tokenizer = load_tokenizer(written.model)
    samples = given_samples(encode_prompts(load_prompts(sft.data), tokenizer, sft.data), tokenizer)
    return sampling_flops(cost_of(load_model(written.model)), samples) / len(samples) * sft.examples_per_step


def curve(metrics: Sequence[dict[str, Any]], more_per_step: float = 0.0) -> Curve:
    """Evaluation is not counted, as it is no part of a method."""
    spent = accumulate(sum(v for name, v in row.items() if name.startswith("flops/")) for row in metrics)
    return [
        (flops + more_per_step * row["step"], row["eval/accuracy"])
        for flops, row in zip(spent, metrics, strict=True)
        if "eval/accuracy" in row
    ]


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
        xlabel="FLOPs of sampling, teacher and training", ylabel="held-out accuracy", xlim=(0, None), ylim=(0, None)
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


PREPARE = {"tiny": prepare_tiny, "smollm2": prepare_smollm2}

if __name__ == "__main__":
    main()
