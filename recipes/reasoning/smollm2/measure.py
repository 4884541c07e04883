"""Setting H with a real model: SmolLM2 less six layers, half-trained, goes on in three ways.

    python recipes/smollm2/make.py                                # says what to install; writes the two models
    python recipes/reasoning/smollm2/measure.py                   # all arms, seed 0
    python recipes/reasoning/smollm2/measure.py sft --seeds 0 1   # some of the arms, more seeds

Every arm runs at three learning rates with seed 0. The accuracy at T = 1 on the validation problems chooses the rate,
and of each run the checkpoint. With other seeds the arm runs at that rate alone. The test problems choose nothing.
Once half/student is there, two commands with other arms may run at once.

Everything is kept in runs/reasoning/smollm2: what is complete is not run again, what was interrupted goes on. After every
run the results are written beside this file, and drawn in figures/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from curves import draw
from make import FOLDER
from make import main as write_rows
from series import Row, here, once, run_here, threads, write_report

from fastkl.trainer.runs.files import read_jsonl

HERE, MODELS = Path(__file__).parent, Path("runs/smollm2")
RATES, SEEDS = (3e-4, 1e-3, 3e-3), 5  # as many seeds as may be asked for
ACCURACIES = {"sampled": "eval/accuracy", "greedy": "eval/accuracy_t0"}
EXAMPLES = 120  # that a step of sft.yaml reads


@dataclass(frozen=True)
class Arm:
    """A way to go on."""

    label: str
    command: str  # its config has the same name
    settings: Row = field(default_factory=dict)


ARMS = {
    "whole": Arm("reverse KL", "distill"),
    "sampled": Arm("policy gradient", "distill", {"loss.objective": "policy_gradient"}),
    "sft": Arm("more SFT", "sft"),
}


@dataclass(frozen=True)
class Run:
    arm: str
    rate: float
    seed: int

    @property
    def folder(self) -> Path:
        return FOLDER / f"{self.arm}-{self.rate:g}-{self.seed}"


def main() -> None:
    import torch

    given = arguments()
    torch.set_num_threads(threads())
    prepare()
    for seed in given.seeds:
        for rate in RATES:  # of all arms before the next: the table is balanced wherever it stops
            for arm in given.arms:
                if not seed:
                    execute(Run(arm, rate, seed))
        for arm in given.arms:
            run = Run(arm, chosen_rate(arm), seed)
            execute(run)
            tested(run.folder.name, run.folder / "student")
            report()
    for name, model in begins().items():
        tested(name, model)
    report()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"some of {', '.join(ARMS)}; all by default")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], choices=range(SEEDS), help="0 is run first: it chooses the rates"
    )
    given = parser.parse_args()
    given.arms = given.arms or list(ARMS)
    if unknown := set(given.arms) - set(ARMS):
        parser.error(f"no such arm: {', '.join(sorted(unknown))}; take some of {', '.join(ARMS)}")
    return given


def prepare() -> None:
    """The rows, the teacher, what it writes, and the half-trained student."""
    if not (FOLDER / "prompts.jsonl").exists():  # written last
        write_rows()
    run_here("sft", HERE / "teacher.yaml", FOLDER / "teacher", {})
    once(FOLDER / "writing", lambda: here("sample", HERE / "transcripts.yaml", FOLDER / "writing.log", {}))
    run_here("sft", HERE / "half.yaml", FOLDER / "half", {})


def begins() -> dict[str, Path]:
    return {
        "teacher": FOLDER / "teacher" / "student",
        "pruned": MODELS / "student",
        "half": FOLDER / "half" / "student",
    }


def execute(run: Run) -> None:
    """The run; nothing where it is complete."""
    arm = ARMS[run.arm]
    run_here(arm.command, HERE / f"{arm.command}.yaml", run.folder, settings_of(run))
    print(run.folder, flush=True)


def settings_of(run: Run) -> Row:
    """What differs from the arm's config."""
    return {"optim.lr": run.rate, "seed": run.seed, **ARMS[run.arm].settings}


def chosen_rate(arm: str) -> float:
    """Of the rates that are complete with seed 0, the one whose run has the best checkpoint at T = 1."""
    tried = [rate for rate in RATES if complete(Run(arm, rate, 0))]
    return max(tried, key=lambda rate: max(point["sampled"] for point in curve(Run(arm, rate, 0))))


def curve(run: Run) -> list[Row]:
    """At each evaluation of a run the step, the FLOPs so far, and the accuracies on the validation problems with errors."""
    metrics = read_jsonl(run.folder / "metrics.jsonl")
    spent = list(accumulate(sum(v for name, v in row.items() if name.startswith("flops/")) for row in metrics))
    writing = writing_flops() if run.arm == "sft" else 0.0
    return [
        {
            "step": row["step"],
            "flops": float(f"{flops + writing * EXAMPLES * row['step']:.4g}"),
            **{name: round(row[key], 4) for name, key in ACCURACIES.items()},
            **{f"{name}_se": round(row[f"{key}_se"], 4) for name, key in ACCURACIES.items()},
        }
        for row, flops in zip(metrics, spent, strict=True)
        if ACCURACIES["sampled"] in row
    ]


def writing_flops() -> float:
    """Of one transcript."""
    found = read(FOLDER / "writing")
    return float(found["flops"] / found["completions"])


def tested(name: str, model: Path) -> Row:
    """Accuracies of a model on the test problems."""
    folder = FOLDER / "test" / name
    return once(folder, lambda: here("eval", HERE / "test.yaml", folder.with_suffix(".log"), {"model.path": model}))


def report() -> None:
    write_report(HERE / "results.json", rows := list(results()))
    draw(rows, HERE.parent / "figures" / "SmolLM2.png", {name: arm.label for name, arm in ARMS.items()})


def results() -> Iterator[Row]:
    """The models that it begins with, what writing cost, and all runs that are complete."""
    writing = read(FOLDER / "writing")
    kept = ("completions", "mean_length", "truncated_fraction")
    yield {"arm": "writing", "flops": writing_flops(), **{name: writing[name] for name in kept}}
    for name in begins():
        yield {"arm": name, **answered(name)}
    for arm in ARMS:
        runs = [Run(arm, rate, seed) for rate in RATES for seed in range(SEEDS)]
        for run in filter(complete, runs):
            yield result(run, run.rate == chosen_rate(arm))


def complete(run: Run) -> bool:
    return (run.folder / "student" / "config.json").exists()


def result(run: Run, chosen: bool) -> Row:
    """The curve of a run, the figures of its steps, and what the test found; `best`: the place of its best checkpoint."""
    steps = read_jsonl(run.folder / "metrics.jsonl")
    figures = {
        name: [round(row[name], 4) for row in steps if name in row]
        for name in ("loss", "teacher_kl", "entropy", "completions/mean_length", "completions/truncated_fraction")
    }
    points = curve(run)
    merits = [point["sampled"] for point in points]
    best = merits.index(max(merits))
    return {**asdict(run), "chosen": chosen, "curve": points, "best": best, **figures, **answered(run.folder.name)}


def answered(name: str) -> Row:
    """What `tested` found, if it was run."""
    folder = FOLDER / "test" / name
    return {"test": read(folder)} if (folder / "result.json").exists() else {}


def read(folder: Path) -> Row:
    found: Row = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
