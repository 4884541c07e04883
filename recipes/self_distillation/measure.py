"""A model learns to do without a context: without the rule of its system prompt, or without examples of a task.

    python recipes/self_distillation/measure.py rule                        # all arms, seeds 0 and 1
    python recipes/self_distillation/measure.py examples distill --seeds 2  # one arm, one seed

recipes/smollm2/make.py says what to install. Everything is kept in runs/self_distillation: what is complete is not run
again, what was interrupted goes on. The results of a part are in PART.json there, and each run's answers in its folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.append(str(Path(__file__).parents[1]))

import torch
from arms import ARMS, folder, train
from evaluate import Model
from parts import RUNS, Part, Row, parts
from series import once, threads, write_report, write_rows

from fastkl.trainer.runs.files import read_jsonl

MAKE, BASE = Path(__file__).parents[1] / "smollm2" / "make.py", Path("runs/smollm2/teacher")
UNTRAINED = ("plain", "prompted")  # the model without and with the context


def main() -> None:
    given = arguments()
    make_model()
    part = parts()[given.part]
    write_rows(part.folder / "train.jsonl", part.learned)
    write_rows(part.folder / "examples.jsonl", part.examples)
    for name in UNTRAINED:
        once(part.folder / name, partial(untrained, part, name))
    for seed in given.seeds:
        for arm in given.arms or ARMS:
            once(folder(part, arm, seed), partial(trained, part, arm, seed))
            write_report(RUNS / f"{part.name}.json", results(part))


def make_model() -> None:
    torch.set_num_threads(threads())
    subprocess.run([sys.executable, MAKE], check=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts())
    parser.add_argument("arms", nargs="*", help=f"run some of {', '.join(ARMS)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    if unknown := set(given.arms) - set(ARMS):
        parser.error(f"no such arm: {', '.join(sorted(unknown))}; take some of {', '.join(ARMS)}")
    return given


def untrained(part: Part, name: str) -> Row:
    """Lets the model as it was answer; what it knows is asked without the context."""
    model, prompted = Model(BASE), name == "prompted"
    answer(part, model, part.folder / name, prompted=prompted)
    return {"arm": name, **({} if prompted else model.kept())}


def trained(part: Part, arm: str, seed: int) -> Row:
    """Lets the model answer after a run of an arm: what it still knows, and what the run cost."""
    run, flops = train(part, arm, seed)
    kl = [row["teacher_kl"] for row in read_jsonl(run / "metrics.jsonl") if "teacher_kl" in row]
    model = Model(run / "student")
    answer(part, model, run)
    return {"arm": arm, "seed": seed, **model.kept(), "flops": flops, "teacher_kl": kl[:1] + kl[-1:]}


def answer(part: Part, model: Model, folder: Path, *, prompted: bool = False) -> None:
    """Writes its answers to the graded prompts."""
    texts = model.answers([part.chat(row, prompted=prompted) for row in part.graded], part.max_new_tokens)
    write_rows(folder / "answers.jsonl", [{**row, "completion": t} for row, t in zip(part.graded, texts, strict=True)])


def results(part: Part) -> Iterator[Row]:
    """All that are there, arm by arm, with the share of the answers that do what the context wants."""
    for name in (*UNTRAINED, *(f"{arm}-[0-9]*" for arm in ARMS)):
        for path in sorted(part.folder.glob(f"{name}/result.json")):
            answers = read_jsonl(path.with_name("answers.jsonl"))
            does = fmean(part.does(row["completion"], row) for row in answers)
            yield json.loads(path.read_text(encoding="utf-8")) | {"does": does, "answers": len(answers)}


if __name__ == "__main__":
    main()
