"""Setting H with a real model: SmolLM2 less six layers, half-trained, goes on in several ways.

    python recipes/smollm2/make.py                          # says what to install; writes teacher and student
    python recipes/reasoning/smollm2/measure.py             # all arms
    python recipes/reasoning/smollm2/measure.py whole sft   # some of the arms

Everything is kept in runs/reasoning/smollm2: what is complete is not run again, what was interrupted goes on. After every
arm the results are written beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from make import FOLDER
from make import main as write_prompts
from series import Row, here, once, run_here, threads, total_flops, write_report

from fastkl.trainer.runs.files import read_jsonl

HERE, MODELS = Path(__file__).parent, Path("runs/smollm2")
ARMS: dict[str, tuple[str, Row]] = {
    "whole": ("distill", {}),
    "sft": ("sft", {}),
    "sampled": ("distill", {"loss.objective": "policy_gradient"}),
}
BEGINS = {"teacher": MODELS / "teacher", "pruned": MODELS / "student"}


def main() -> None:
    import torch

    arms = arguments()
    torch.set_num_threads(threads())
    if not (FOLDER / "prompts.jsonl").exists():
        write_prompts()
    once(FOLDER / "writing", lambda: here("sample", HERE / "transcripts.yaml", FOLDER / "writing.log", {}))
    run_here("sft", HERE / "half.yaml", FOLDER / "half", {})
    tested("half", saved("half"))
    for arm in arms:
        command, settings = ARMS[arm]
        run_here(command, HERE / f"{command}.yaml", FOLDER / arm, settings)
        tested(arm, saved(arm))
        write_report(HERE / "results.json", results())
    for name, model in BEGINS.items():
        tested(name, model)
    write_report(HERE / "results.json", results())


def arguments() -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"some of {', '.join(ARMS)}; all by default")
    arms: list[str] = parser.parse_args().arms or list(ARMS)
    if unknown := set(arms) - set(ARMS):
        parser.error(f"no such arm: {', '.join(sorted(unknown))}; take some of {', '.join(ARMS)}")
    return arms


def saved(run: str) -> Path:
    return FOLDER / run / "student"


def tested(name: str, model: Path) -> Row:
    """Accuracies of a model on the test problems."""
    folder = FOLDER / "test" / name
    return once(folder, lambda: here("eval", HERE / "test.yaml", folder.with_suffix(".log"), {"model.path": model}))


def answered(name: str) -> Row:
    """What `tested` found, if it was run."""
    path = FOLDER / "test" / name / "result.json"
    return {"test": json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}


def results() -> Iterator[Row]:
    """What writing cost, the models that it begins with, and all runs that are complete."""
    writing = json.loads((FOLDER / "writing" / "result.json").read_text(encoding="utf-8"))
    yield {"arm": "writing", "flops": writing["flops"] / writing["completions"]}
    for name in (*BEGINS, "half"):
        yield {"arm": name, **answered(name)}
    for arm in ARMS:
        if saved(arm).exists():
            yield {"arm": arm, **result(arm)}


def result(run: str) -> Row:
    """The figures of the steps, and what the test found; FLOPs without the transcripts."""
    steps = read_jsonl(FOLDER / run / "metrics.jsonl")
    figures = {
        name: [round(row[name], 4) for row in steps if name in row] for name in ("loss", "teacher_kl", "entropy")
    }
    return {"steps": len(steps), "flops": total_flops(FOLDER / run), **figures, **answered(run)}


if __name__ == "__main__":
    main()
