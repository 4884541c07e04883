"""Does training notice which backward pass it has? The same runs with the exact and the sparse one, seed for seed.

    python recipes/demo/run.py && python recipes/compare_backward.py demo          # each makes its pair of models first
    python recipes/smollm2/make.py && python recipes/compare_backward.py smollm2   # a shortened run
    python recipes/compare_backward.py plot                               # bench/figures/sparse-training.png, and a table

Runs are kept in runs/compare_backward; one that is finished is not made again. Their metrics become
bench/results/training/backward-PAIR.json.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "smollm2")]  # for bench, and for heal.py
from heal import nats_per_token  # noqa: E402

RUNS, RESULTS = Path("runs/compare_backward"), Path("bench/results/training")
PLOT = Path("bench/figures/sparse-training.png")
KEPT = ("step", "teacher_kl", "eval/accuracy", "policy/kept_fraction", "policy/grad_error", "time/train")
LAST = 5  # steps that a final teacher_kl is the mean of: one step's is that of a few samples

Arms = dict[str, dict[str, Any]]
EXACT: Arms = {"exact": {"loss.backward": "exact"}}
SPARSE: Arms = {"sparse": {"loss.backward": "sparse"}}
# The demo's vocabulary is so small that an error of 2e-3 asks for all of it; this one does not.
ROUGH: Arms = {"sparse, error 0.1": {"loss.backward": "sparse", "loss.sparse_error": 0.1}}


class Pair(NamedTuple):
    """A recipe, how it is shortened, and how often it is run."""

    arms: Arms
    seeds: int
    shorter: dict[str, Any]
    scored: str = ""  # the config of `fastkl score` that says how likely held-out completions are to the student


PAIRS = {
    "demo": Pair(EXACT | SPARSE | ROUGH, seeds=2, shorter={}),
    "smollm2": Pair(
        EXACT | SPARSE,
        seeds=3,
        shorter={
            "sampling.prompts_per_step": 8,
            "sampling.max_requests": 8,
            "sampling.max_new_tokens": 24,
            "optim.steps": 12,
            "optim.substeps": 1,
        },
        scored="score.yaml",
    ),
}


def main() -> None:
    if sys.argv[1:] == ["plot"]:
        reports = {name: json.loads(file.read_text()) for name in PAIRS if (file := _results(name)).is_file()}
        print(*(line for name, report in reports.items() for line in _table(name, report)), sep="\n")
        _draw(reports)
    elif len(sys.argv) == 2 and sys.argv[1] in PAIRS:
        _run(sys.argv[1], PAIRS[sys.argv[1]])
    else:
        sys.exit(f"usage: python {sys.argv[0]} {{{','.join(PAIRS)},plot}}")


def _run(name: str, pair: Pair) -> None:
    runs = []
    for seed in range(pair.seeds):  # seed by seed, so that what there is of an unfinished comparison is a comparison
        for arm, options in pair.arms.items():
            folder = RUNS / name / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "student").is_dir():
                _distill(name, {"run": folder, "seed": seed, **pair.shorter, **options})
            found = {"heldout/nats": _nats(name, pair.scored, folder)} if pair.scored else {}
            runs.append({"arm": arm, "seed": seed, "metrics": _metrics(folder), **found})
            _write(name, {"pair": name, "shorter": pair.shorter, "arms": pair.arms, "runs": runs})


def _distill(name: str, options: dict[str, Any]) -> None:
    _fastkl("distill", Path(__file__).parent / name / "distill.yaml", options)


def _nats(name: str, config: str, folder: Path) -> float:
    """Per token of held-out completions; what the samples of a few steps say of a student is far noisier."""
    scores = folder / "heldout.jsonl"
    if not scores.exists():
        _fastkl("score", Path(__file__).parent / name / config, {"model.path": folder / "student", "output": scores})
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    return nats_per_token(rows)


def _fastkl(command: str, config: Path, options: dict[str, Any]) -> None:
    overrides = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "fastkl.cli", command, str(config), *overrides], env=environment, check=True)


def _metrics(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: float(f"{row[key]:.5g}") for key in KEPT if row.get(key) is not None} for row in rows]


def _write(name: str, report: dict[str, Any]) -> None:
    from bench.lib.machine import describe_machine, describe_versions

    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    report |= {"machine": describe_machine("cpu"), "versions": describe_versions("transformers"), "date": date}
    _results(name).parent.mkdir(parents=True, exist_ok=True)
    _results(name).write_text(json.dumps(report, indent=1) + "\n")


def _results(name: str) -> Path:
    return RESULTS / f"backward-{name}.json"


def _values(report: dict[str, Any], arm: str, key: str, last: int) -> list[float]:
    """The mean over the last so many values of each run of an arm that has some."""
    series = [[row[key] for row in run["metrics"] if key in row] for run in report["runs"] if run["arm"] == arm]
    return [statistics.fmean(values[-last:]) for values in series if values]


def _table(name: str, report: dict[str, Any]) -> list[str]:
    """Mean ± standard deviation over the seeds."""
    lines = [f"{name}: arm | runs | teacher_kl | accuracy | kept | held-out nats | seconds of an update"]
    for arm in report["arms"]:
        found = [
            _values(report, arm, key, last)
            for key, last in (("teacher_kl", LAST), ("eval/accuracy", 1), ("policy/kept_fraction", 10**6))
        ]
        seconds = _values(report, arm, "time/train", 10**6)
        nats = [run["heldout/nats"] for run in report["runs"] if run["arm"] == arm and "heldout/nats" in run]
        cells = [f"{statistics.fmean(v):.4f} ± {_deviation(v):.4f}" if v else "" for v in (*found, nats, seconds)]
        lines.append(" | ".join([arm, str(len(found[0])), *cells]))
    return lines


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _draw(reports: dict[str, dict[str, Any]]) -> None:
    """teacher_kl of each pair and the accuracy of those that have one; a line for each run, a colour for each arm."""
    from matplotlib.figure import Figure

    keys = {"teacher_kl": "teacher_kl (nats per token)", "eval/accuracy": "held-out accuracy"}
    panels = [
        (name, key, label)
        for name, report in reports.items()
        for key, label in keys.items()
        if any(key in row for run in report["runs"] for row in run["metrics"])
    ]
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained", facecolor="white")
    for panel, (name, key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for colour, (arm, style) in enumerate(zip(reports[name]["arms"], ("-", "--", ":"), strict=False)):
            for i, run in enumerate(run for run in reports[name]["runs"] if run["arm"] == arm):
                rows = [(row["step"], row[key]) for row in run["metrics"] if key in row]
                panel.plot(
                    *zip(*rows, strict=True), style, color=f"C{colour}", label=None if i else arm, lw=1.2, alpha=0.8
                )
        panel.set(title=name, xlabel="step", ylabel=label, ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(PLOT, dpi=130)
    print(PLOT)


if __name__ == "__main__":
    main()
