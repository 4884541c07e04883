"""Which objective learns fastest: all of them on one student, at several learning rates, batches and seeds.

    python recipes/objectives/measure.py tiny --jobs 2       # models of the demo, sums of three digits
    python recipes/objectives/measure.py smollm2             # recipes/smollm2/make.py says what to install

For each number of tokens per optimizer step, every objective runs once at each learning rate (seed 0). Those that end
nearest to the teacher give its learning rate. It then runs at that rate with three other seeds, which are what is shown.

Everything is kept in runs/objectives: what is complete is not run again, what was interrupted goes on. After every run
the results are written to runs/objectives/SCALE.json, and drawn beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from figure import draw
from series import fastkl, write_report

from fastkl.trainer.runs.files import read_jsonl, write_text

HERE, RUNS = Path(__file__).parent, Path("runs/objectives")
SEEDS = (1, 2, 3)  # 0 chooses the learning rate
Settings = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """A pair of models, and what its runs vary."""

    rates: tuple[float, ...]
    batches: dict[int, int]
    """Prompts per step, by about how many tokens an optimizer step has."""
    top_k: int
    last: int
    """Steps whose mean is where a run ends."""
    prepare: Callable[[], None]


@dataclass(frozen=True)
class Run:
    """One run of an objective."""

    objective: str
    tokens: int
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.objective}-{self.tokens}-{self.rate:g}-{self.seed}"


OBJECTIVES: dict[str, Settings] = {
    "sampled": {},
    "sampled_baseline": {"baseline": "mean"},
    "sampled_power": {"advantage_power": 1.0},
    "bucket": {"objective": "top_k"},
    "tail": {"objective": "top_k", "top_k_tail": "sampled"},
    "half_tail": {"objective": "top_k", "top_k_tail": "sampled", "tail_weight": 0.5},
    "whole": {"objective": "reverse_kl"},
}
LEADING = ("bucket", "tail", "whole")
LARGEST = 10_000  # from so many tokens on, the leading objectives alone


def main() -> None:
    given = arguments()
    scale = SCALES[given.scale]
    scale.prepare()
    tokens = given.tokens or list(scale.batches)
    names = given.objectives or list(OBJECTIVES)
    for size in tokens:
        leading = [name for name in names if size < LARGEST or name in LEADING]
        run_all(
            given.scale,
            (Run(name, size, rate, 0) for rate in given.rates or scale.rates for name in leading),
            given.jobs,
        )
        chosen = {name: best_rate(given.scale, name, size) for name in leading}
        run_all(
            given.scale, (Run(n, size, rate, seed) for seed in given.seeds for n, rate in chosen.items()), given.jobs
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=SCALES, help="choose the models and the task")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, help="run these, all by default")
    parser.add_argument("--tokens", type=int, nargs="+", help="run these sizes of an optimizer step, all by default")
    parser.add_argument("--rates", type=float, nargs="+", help="try these learning rates, the scale's by default")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=SEEDS, help="repeat the best with these; without any, only choose"
    )
    parser.add_argument("--jobs", type=int, default=1, help="run so many at once, a core each")
    return parser.parse_args()


def run_all(scale: str, runs: Iterable[Run], jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda run: execute(scale, run), runs):
            report(scale)


def report(scale: str) -> None:
    """All runs that are complete, and what they were made on."""
    runs = list(results(scale))
    write_report(RUNS / f"{scale}.json", runs, indent=None)
    draw(runs, RUNS / f"{scale}.png")


def execute(scale: str, run: Run) -> None:
    """`fastkl distill`, in a process of its own; nothing for a run that is complete."""
    folder = RUNS / scale / run.folder
    if (folder / "result.json").exists():
        return
    fastkl("distill", HERE / f"{scale}.yaml", folder, settings_of(scale, run))
    result = asdict(run) | summary(scale, read_jsonl(folder / "metrics.jsonl"))
    write_text(folder / "result.json", json.dumps(result) + "\n")
    print(run.folder, flush=True)


def settings_of(scale: str, run: Run) -> Settings:
    """What differs from the scale's config."""
    given, loss = SCALES[scale], OBJECTIVES[run.objective]
    settings = {
        "seed": run.seed,
        "optim.lr": run.rate,
        "sampling.prompts_per_step": given.batches[run.tokens],
        **{f"loss.{name}": value for name, value in loss.items()},
    }
    if loss.get("objective") == "top_k":
        settings["loss.top_k"] = given.top_k
    return settings


def summary(scale: str, metrics: list[Settings]) -> Settings:
    """Where a run ended, and its curves by step."""
    kl = {row["step"]: row["teacher_kl"] for row in metrics if "teacher_kl" in row}
    accuracy = {row["step"]: row["eval/accuracy"] for row in metrics if "eval/accuracy" in row}
    return {
        "teacher_kl": fmean(list(kl.values())[-SCALES[scale].last :]),
        "accuracy": accuracy[max(accuracy)] if accuracy else None,
        "curves": {"teacher_kl": kl, "accuracy": accuracy},
    }


def results(scale: str) -> Iterator[Settings]:
    for path in sorted((RUNS / scale).glob("*/result.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def best_rate(scale: str, objective: str, tokens: int) -> float:
    """The learning rate whose run with seed 0 ended nearest to the teacher."""
    tried = [r for r in results(scale) if (r["objective"], r["tokens"], r["seed"]) == (objective, tokens, 0)]
    rate: float = min(tried, key=lambda result: result["teacher_kl"])["rate"]
    return rate


def prepare_tiny() -> None:
    """The demo's data and teacher, and a student that has seen a few right solutions."""
    demo = HERE.parent / "demo"
    sys.path.append(str(demo))
    from run import prepare

    prepare()
    for folder, config in (
        ("runs/demo/teacher", demo / "teacher.yaml"),
        ("runs/objectives/student", HERE / "student.yaml"),
    ):
        fastkl("sft", config, Path(folder), {})


def prepare_smollm2() -> None:
    subprocess.run([sys.executable, HERE.parent / "smollm2" / "make.py"], check=True)


SCALES = {
    "tiny": Scale((2e-4, 6e-4, 2e-3), {1000: 160, 4000: 600, 16000: 2400}, 3, 10, prepare_tiny),
    "smollm2": Scale((1e-4, 2e-4, 4e-4), {600: 16, 4000: 100}, 20, 3, prepare_smollm2),
}

if __name__ == "__main__":
    main()
