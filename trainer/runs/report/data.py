"""What a report shows of a run: its settings, metrics and samples, read from the folder as plain data of bounded size."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from fastkl.trainer.config.loss import OPTION_OF
from fastkl.trainer.config.losses.control import remark
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.changes import read_changes
from fastkl.trainer.runs.files import read_jsonl
from fastkl.trainer.runs.report.curves import Json, series
from fastkl.trainer.runs.report.samples import page_samples
from fastkl.trainer.runs.settings import flat

# Of these a page of one run shows what it has; of the loss's options those of its objective.
MAIN_SETTINGS = (
    "student.path",
    "student.lora.rank",
    "teacher.path",
    "teacher.tokenizer",
    "teacher.server.url",
    "data.path",
    "data.name",
    "data.dataset",
    "examples_per_step",
    "sampling.prompts_per_step",
    "sampling.samples_per_prompt",
    "sampling.max_new_tokens",
    "sampling.temperature",
    "loss.objective",
    "loss.method",
    "loss.kl_coef",
    "loss.discount",
    "loss.baseline",
    "loss.advantage_power",
    "loss.extrapolate",
    "loss.old_logprobs",
    "loss.jsd_beta",
    "loss.skew_alpha",
    "loss.divergence_power",
    "loss.top_k",
    "loss.top_k_of",
    "loss.top_k_direction",
    "loss.top_k_tail",
    "loss.tail_weight",
    "loss.forward_kl_above",
    "loss.weights",
    "loss.control",
    "optim.lr",
    "optim.schedule",
    "optim.steps",
    "optim.warmup_steps",
    "optim.substeps",
    "mixed_precision",
    "seed",
)
CHANGES = 100  # at most that many are shown, the last ones
CHANGE_CHARACTERS = 200  # of a setting's value in a change
GUARD_CHARACTERS = 1000

BESIDE = "time/rollouts"  # no phase of a step, but beside those of earlier ones
FLOPS = ("flops/sampling", "flops/teacher", "flops/student")  # of a step, as time/* are; those of every distillation
REFERENCE_FLOPS = "flops/reference"


def run_data(path: Path, name: str, sample_bytes: int) -> Json:
    """All that the page shows of one run; at most `sample_bytes` of it are samples."""
    settings = _settings(path)
    rows = _metrics(path)
    axes = {"step": [row["step"] for row in rows], "tokens": _tokens(rows, settings), "flops": _flops(rows, settings)}
    curves, kept = series(rows)
    return {
        "name": name,
        "path": str(path),
        "kind": "distill" if "teacher" in settings else "sft",
        "control": remark(settings.get("loss", {}).get("control")),
        "steps_done": rows[-1]["step"],
        "steps_planned": settings.get("optim", {}).get("steps"),
        "logged": _last_change(path / "metrics.jsonl"),
        "settings": {name: _text(value) for name, value in flat(settings)},
        "main": main_settings(dict(flat(settings))),
        "changes": _changes(path, axes),
        "guards": _guards(path),
        "x": {axis: [values[row] for row in kept] for axis, values in axes.items() if values is not None},
        "series": curves,
        "seconds": _seconds(rows),
        "samples": page_samples(path, sample_bytes),
    }


def main_settings(settings: Mapping[str, Any]) -> list[str]:
    """The settings that matter most, of those that a run has: an option of another objective than its own does not."""
    objective = settings.get("loss.objective")
    return [
        name
        for name in MAIN_SETTINGS
        if name in settings and objective in OPTION_OF.get(name.removeprefix("loss."), (objective,))
    ]


def _changes(path: Path, axes: Mapping[str, Sequence[float] | None]) -> list[Json]:
    """Where on each axis settings were changed, and what they were and are, in words."""
    rows = [row for row in read_changes(path) if isinstance(row["step"], int)][-CHANGES:]
    found = []
    for step in sorted({row["step"] for row in rows}):
        last = bisect_right(axes["step"] or (), step) - 1
        x = {axis: values[last] if last >= 0 else 0 for axis, values in axes.items() if values is not None}
        texts = [
            f"{_cut(row['setting'])}: {_cut(row['was'])} → {_cut(row['is'])}" for row in rows if row["step"] == step
        ]
        found.append({"step": step, "x": {**x, "step": step}, "texts": texts})
    return found


def _guards(path: Path) -> list[str]:
    """What guards found, each from which step on; of the rules that there are, each stands there once."""
    rows = [row for row in read_jsonl(path / "guards.jsonl") if {"step", "rule", "text"} <= row.keys()]
    return [_cut(f"step {row['step']}: {row['rule']}: {row['text']}", GUARD_CHARACTERS) for row in rows[:CHANGES]]


def _cut(value: Any, characters: int = CHANGE_CHARACTERS) -> str:
    text = _text(value)
    return text if len(text) <= characters else f"{text[:characters]}…"


def differences(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that are not the same in all runs; one that a run does not have is none."""
    keys = dict.fromkeys(key for run in runs for key in run["settings"])
    return [key for key in keys if len({run["settings"].get(key) for run in runs}) > 1]


def run_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    raise ConfigError(f"a run is named twice: {' '.join(map(str, paths))}; name each once")


def _settings(path: Path) -> Json:
    file = path / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; name a run folder, as `run` does in the config of a training run")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds no settings; name a run folder that fastkl wrote")
    return settings


def _metrics(path: Path) -> list[Json]:
    file = path / "metrics.jsonl"
    rows = [row for row in read_jsonl(file) if isinstance(row, dict) and isinstance(row.get("step"), int)]
    if not rows:
        raise ConfigError(
            f"{file} has no complete row yet; let the run take a step, by the command that started it, and report again"
        )
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _last_change(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _tokens(rows: Sequence[Json], settings: Json) -> list[float] | None:
    """Completion tokens up to each row: sampled by the student (distill) or given (sft)."""
    sampling = settings.get("sampling", {})
    per_step = settings.get("examples_per_step") or math.prod(
        sampling.get(name, 0) for name in ("prompts_per_step", "samples_per_prompt")
    )
    total = list(accumulate(round(row.get("completions/mean_length", 0) * per_step) for row in rows))
    return total if total[-1] else None


def _flops(rows: Sequence[Json], settings: Json) -> list[float] | None:
    """FLOPs of sampling, scoring and training together, up to each row; None if the run did not count all of them."""
    wanted = FLOPS if "teacher" in settings else FLOPS[-1:]
    if any("flops/student" in row and not all(name in row for name in wanted) for row in rows):
        return None  # a served teacher's are unknown: the rest would flatter the run
    total = list(accumulate(sum(row.get(name, 0) for name in (*FLOPS, REFERENCE_FLOPS)) for row in rows))
    return total if total[-1] else None


def _seconds(rows: Iterable[Json]) -> dict[str, float]:
    """Seconds of each phase, all steps together."""
    total: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.items():
            if name.startswith("time/") and name != BESIDE:
                total[name.removeprefix("time/")] += value
    return {name: round(value, 3) for name, value in total.items()}
