"""New knowledge and old manners: every phase of the recipe, each followed by the same tests.

    python recipes/personalisation/measure.py                  # all phases, seeds 0 and 1
    python recipes/personalisation/measure.py read --seeds 2   # one phase and those that it needs, one seed

README.md says what to install. Everything is kept in runs/personalisation: what is complete is not run again, what was
interrupted goes on. The results are in results.json there, the answers of each phase in its folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from evaluate import Row, grade, reads
from make import BASE, RUNS, make
from phases import HERE, PHASES, folder, needed, settings_of, template
from series import fastkl, once, threads, total_flops, write_report

from fastkl.trainer.runs.files import read_jsonl

RESULTS = RUNS / "results.json"


def main() -> None:
    given = arguments()
    torch.set_num_threads(threads())
    subprocess.run([sys.executable, HERE.parent / "smollm2" / "make.py"], check=True)
    make()
    once(RUNS / "before", before)
    for seed in given.seeds:
        for name in needed(given.phases):
            once(folder(name, seed), partial(measured, name, seed))
            write_report(RESULTS, results())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "phases", nargs="*", help=f"run some of {', '.join(PHASES)}, and what they need; all by default"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    if unknown := set(given.phases) - set(PHASES):
        parser.error(f"no such phase: {', '.join(sorted(unknown))}; take some of {', '.join(PHASES)}")
    return given


def before() -> Row:
    """The model as it was, and what it would answer with the document before it."""
    return {"phase": "before", **grade(BASE, RUNS, RUNS / "before"), "reads": reads(BASE, RUNS, template())}


def measured(name: str, seed: int) -> Row:
    """Runs a phase, and grades the student."""
    run, phase = folder(name, seed), PHASES[name]
    fastkl(phase.command, HERE / phase.config, run, settings_of(name, seed))
    kl = [row["teacher_kl"] for row in read_jsonl(run / "metrics.jsonl") if "teacher_kl" in row]
    told = {"teacher_kl": [kl[0], kl[-1]]} if kl else {}
    return {"phase": name, "seed": seed, **grade(run / "student", RUNS, run), **told, "flops": total_flops(run)}


def results() -> Iterator[Row]:
    """All that are there, phase by phase."""
    for name in ("before", *(f"{name}-[0-9]*" for name in PHASES)):
        for path in sorted(RUNS.glob(f"{name}/result.json")):
            yield json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
