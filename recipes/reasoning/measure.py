"""When on-policy distillation pays: four settings, and in each the same student goes on in several ways.

    python recipes/reasoning/measure.py                      # all settings, seed 0
    python recipes/reasoning/measure.py Z H --seeds 0 1 2    # some of them; two such commands may run at once

Every arm runs at three learning rates with seed 0. The validation problems choose one of them, and with other seeds the arm
runs at that rate alone. What is shown is measured on the test problems.

Everything is kept in runs/reasoning: what is complete is not run again, what was interrupted goes on. After every arm
the results are written to runs/reasoning/results.json. After every setting they are drawn beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from arms import (
    ARMS,
    CONTROLS,
    HERE,
    MODELS,
    POINTS,
    RUNS,
    SETTINGS,
    VARIANTS,
    Run,
    amounts,
    first_stage,
    rates,
    rows_of,
    settings_of,
    start,
)
from figure import draw
from grading import TEMPERATURES, graded, graded_checkpoints
from series import Row, here, once, run_here, threads, write_report, write_rows
from sums import write_data

from fastkl.trainer.runs.files import read_jsonl

SETS = ("validation", "test")
EXAMPLES = 64  # that a step of sft.yaml reads
VARIED = "Z"  # the setting of the variants that are no controls
# By `sft`: the untrained model, solutions, steps, learning rate.
FROM_NOTHING = {
    "plain": ("teacher", "plain", 800, 4e-3),
    "styled": ("teacher", "styled", 1500, 4e-3),
    "careless": ("student", "careless", 800, 4e-3),
}


def main() -> None:
    given = arguments()
    prepare(given.settings)
    for seed in given.seeds:
        for setting in given.settings:
            begin(setting, seed)
            for name in ARMS:
                for prompts in amounts(setting, name):
                    tuned(setting, name, prompts, seed)
                    report()
            if not seed:
                controls(setting)
            report()
            draw(list(results()), RUNS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help=f"run some of {', '.join(SETTINGS)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="0 is run first: it chooses the rates")
    given = parser.parse_args()
    given.settings = given.settings or list(SETTINGS)
    if unknown := set(given.settings) - set(SETTINGS):
        parser.error(f"no such setting: {', '.join(sorted(unknown))}; take some of {', '.join(SETTINGS)}")
    return given


def prepare(settings: list[str]) -> None:
    """Data, the teachers and the careless student, and what the teachers write."""
    import torch

    torch.set_num_threads(threads())
    write_data(MODELS)
    teachers = {SETTINGS[name].teacher for name in settings}
    for name in sorted(teachers | ({"careless"} if any(SETTINGS[name].careless for name in settings) else set())):
        model, solutions, steps, rate = FROM_NOTHING[name]
        begins = {"student.path": MODELS / model, "data.path": MODELS / f"{solutions}.jsonl"}
        learned = {"optim.steps": steps, "optim.lr": rate, "optim.warmup_steps": 50}
        kept = {"checkpoint.every": 100, "checkpoint.keep": 1}
        run_here("sft", HERE / "sft.yaml", MODELS / name, {**begins, **learned, **kept})
    for name in sorted(teachers):
        once(MODELS / name, partial(written, name))


def written(teacher: str) -> Row:
    """The teacher's transcripts of all problems; how right it is, and what a transcript costs."""
    student, output = MODELS / teacher / "student", transcripts(teacher)
    settings = {"model.path": student, "output": output, "data.path": MODELS / "plain.jsonl"}
    found = here("sample", HERE / "transcripts.yaml", output.with_suffix(".log"), settings)
    return {
        **{name: graded(student, MODELS / f"{name}.jsonl") for name in SETS},
        "transcripts_right": found["mean_score"],
        "writing": found["flops"] / found["completions"],
    }


def transcripts(teacher: str) -> Path:
    return MODELS / f"{teacher}-transcripts.jsonl"


def begin(setting: str, seed: int) -> None:
    """The rows of a seed, and the student that its arms go on from."""
    path = rows_of(setting, seed)
    if not path.exists():
        rows = read_jsonl(transcripts(SETTINGS[setting].teacher))
        random.Random(seed).shuffle(rows)
        write_rows(path, ({name: row[name] for name in ("prompt", "answer", "completion")} for row in rows))
    if SETTINGS[setting].first:
        run_here("sft", HERE / "sft.yaml", start(setting, seed).parent, first_stage(setting, seed))
    student = start(setting, seed)
    known = {"setting": setting, "arm": "start", "seed": seed}
    once(
        RUNS / setting / f"begin-{seed}",
        lambda: {**known, **{name: graded(student, MODELS / f"{name}.jsonl") for name in SETS}},
    )


def tuned(setting: str, arm: str, prompts: int, seed: int) -> None:
    """An arm at all its rates with seed 0, at the chosen one with another."""
    if not seed:
        runs = [Run(setting, arm, prompts, rate, 0) for rate in rates(setting, arm, prompts)]
        for run in runs:
            execute(run)
    run = Run(setting, arm, prompts, chosen_rate(setting, arm, prompts), seed)
    execute(run)
    measured(run, "test")
    for path in run.folder.parent.glob(f"{arm}-{prompts}-*-{seed}/checkpoints"):
        shutil.rmtree(path)


def controls(setting: str) -> None:
    """Variants of the policy gradient on few prompts; but for one setting the controls alone."""
    few = SETTINGS[setting].few
    rate = chosen_rate(setting, "sampled", few)
    for name in VARIANTS:
        if name in CONTROLS or setting == VARIED:
            run = Run(setting, name, few, rate, 0)
            execute(run)
            measured(run, "test")
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def execute(run: Run) -> None:
    """The run, graded on the validation problems; nothing where that is done."""
    if (run.folder / "validation" / "result.json").exists():
        return
    began = time.process_time()
    arm = ARMS[run.arm if run.arm in ARMS else "sampled"]
    run_here(arm.command, HERE / f"{arm.config}.yaml", run.folder, settings_of(run))
    measured(run, "validation")
    print(f"{run.folder} {time.process_time() - began:.0f} s", flush=True)


def measured(run: Run, name: str) -> list[Row]:
    """The curve of a run on the validation or the test problems."""
    rows = MODELS / f"{name}.jsonl"
    found = once(
        run.folder / name,
        lambda: {**asdict(run), "curve": graded_checkpoints(run.folder, start(run.setting, run.seed), rows)},
    )
    return regular(found["curve"])


def regular(curve: list[Row]) -> list[Row]:
    """Without the checkpoint at which a run was interrupted."""
    every = curve[-1]["step"] // POINTS
    return [point for point in curve if point["step"] % every == 0]


def chosen_rate(setting: str, arm: str, prompts: int) -> float:
    """The rate whose run with seed 0 has the best checkpoint."""
    tried = [Run(setting, arm, prompts, rate, 0) for rate in rates(setting, arm, prompts)]
    return max(tried, key=lambda run: max(map(merit, measured(run, "validation")))).rate


def merit(point: Row) -> float:
    """What chooses a rate, and a checkpoint: both accuracies count alike."""
    total: float = point["greedy"] + point["sampled"]
    return total


def report() -> None:
    write_report(RUNS / "results.json", results(), indent=None)


def results() -> Iterator[Row]:
    """The teacher, where each seed begins, and all runs that are complete."""
    for setting, given in SETTINGS.items():
        taught = MODELS / given.teacher / "result.json"
        if taught.exists():
            yield {"setting": setting, "arm": "teacher", **read(taught)}
        for path in sorted((RUNS / setting).glob("begin-*/result.json")):
            yield read(path)
        for name in (*ARMS, *VARIANTS):
            for path in sorted((RUNS / setting).glob(f"{name}-*/validation/result.json")):
                yield result(path.parents[1])


def result(folder: Path) -> Row:
    """A run, and at each of its checkpoints FLOPs and accuracies; `best` is the place of the one that validation chooses.

    A run whose rate was not chosen has no curve of the test.
    """
    found = {name: read(path) for name in SETS if (path := folder / name / "result.json").exists()}
    run = Run(*(found["validation"][name] for name in Run.__dataclass_fields__))
    curves = {name: regular(part["curve"]) for name, part in found.items()}
    metrics = read_jsonl(folder / "metrics.jsonl")
    spent = list(accumulate(sum(v for name, v in row.items() if name.startswith("flops/")) for row in metrics))
    steps = [point["step"] for point in curves["validation"]]
    writing = read(MODELS / SETTINGS[run.setting].teacher / "result.json")["writing"] if run.arm == "sft" else 0.0
    merits = [merit(point) for point in curves["validation"]]
    written = [writing * min(run.prompts, EXAMPLES * step) for step in steps]
    return {
        **asdict(run),
        "chosen": "test" in curves,
        "best": merits.index(max(merits)),
        "steps": steps,
        "flops": [float(f"{spent[step - 1] + more:.4g}") for step, more in zip(steps, written, strict=True)],
        "first": {name: round(metrics[0][name], 4) for name in ("teacher_kl", "entropy") if name in metrics[0]},
        **{part: {name: [point[name] for point in curve] for name in TEMPERATURES} for part, curve in curves.items()},
    }


def read(path: Path) -> Row:
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
