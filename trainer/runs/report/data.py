"""What a report shows of a run: its settings, metrics and samples, read from the folder as plain data of bounded size."""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from itertools import accumulate, compress
from pathlib import Path
from typing import Any

import yaml

from fastkl.trainer.config.settings import flat
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.files import read_jsonl
from fastkl.trainer.runs.samples_log import NAME, find_records, read_records

POINTS = 1000  # of a curve
STEPS = 40  # whose samples are shown
SAMPLES = 8  # of a step
FLOPS = ("flops/sampling", "flops/teacher", "flops/student")  # of a step, as time/* are

Json = dict[str, Any]


def run_data(path: Path, name: str, sample_bytes: int) -> Json:
    """All that the page shows of one run; at most `sample_bytes` of it are samples."""
    settings = _settings(path)
    rows = _metrics(path)
    axes = {"step": [row["step"] for row in rows], "tokens": _tokens(rows, settings), "flops": _flops(rows, settings)}
    series, kept = _series(rows)
    return {
        "name": name,
        "path": str(path),
        "kind": "distill" if "teacher" in settings else "sft",
        "steps_done": rows[-1]["step"],
        "steps_planned": settings.get("optim", {}).get("steps"),
        "logged": _last_change(path / "metrics.jsonl"),
        "settings": {name: _text(value) for name, value in flat(settings)},
        "x": {axis: [values[row] for row in kept] for axis, values in axes.items() if values is not None},
        "series": series,
        "seconds": _seconds(rows),
        "samples": _samples(path, sample_bytes),
    }


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
    """FLOPs of sampling, teacher and student together, up to each row; None if the run did not count all of them."""
    wanted = FLOPS if "teacher" in settings else FLOPS[-1:]
    if any("flops/student" in row and not all(name in row for name in wanted) for row in rows):
        return None  # a served teacher's are unknown: the rest would flatter the run
    total = list(accumulate(sum(row.get(name, 0) for name in FLOPS) for row in rows))
    return total if total[-1] else None


def _series(rows: Sequence[Json]) -> tuple[dict[str, Json], list[int]]:
    """Each metric's points, thinned out, and the rows that any of them is in; `at` counts those rows."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for number, row in enumerate(rows):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                points[name].append((number, value))
    thinned = {name: thin(values, POINTS) for name, values in points.items()}
    kept = sorted({row for values in thinned.values() for row, _ in values})
    position = {row: at for at, row in enumerate(kept)}
    series = {
        name: {"at": [position[row] for row, _ in values], "values": [_plain(value) for _, value in values]}
        for name, values in thinned.items()
    }
    return series, kept


def thin(points: list[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """About `limit` of the points: the ends, and of each stretch its lowest, its highest, and one that is not finite."""
    if len(points) <= limit:
        return points
    width = math.ceil(3 * len(points) / limit)
    kept = {points[0][0]: points[0], points[-1][0]: points[-1]}
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        finite = [point for point in stretch if math.isfinite(point[1])]
        wild = [point for point in stretch if not math.isfinite(point[1])]
        for pick in (min(finite, key=_value), max(finite, key=_value)) if finite else ():
            kept[pick[0]] = pick
        kept |= {point[0]: point for point in wild[:1]}
    return [kept[row] for row in sorted(kept)]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _plain(value: float) -> float | str:
    """Six significant digits; NaN and infinities, which JSON has no number for, by their names."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _seconds(rows: Iterable[Json]) -> dict[str, float]:
    """Seconds of each phase, all steps together."""
    total: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.items():
            if name.startswith("time/"):
                total[name.removeprefix("time/")] += value
    return {name: round(value, 3) for name, value in total.items()}


def _samples(path: Path, limit: int) -> Json:
    """Samples of steps spread over the run, while they fit, and how many there are in all."""
    places = find_records(path / NAME)
    steps, shown = sorted(places), list[Json]()
    for step in [steps[index] for index in spread(len(steps), STEPS)]:
        for number, record in enumerate(read_records(path / NAME, places[step][:SAMPLES])):
            sample = _sample(record, number, path / "student")
            size = len(json.dumps(sample, ensure_ascii=False).encode("utf-8", errors="replace"))
            if size <= limit:
                limit -= size
                shown.append(sample)
    shown.sort(key=lambda sample: (sample["step"], sample["number"]))
    return {"shown": shown, "steps": len(steps), "count": sum(map(len, places.values()))}


def spread(count: int, limit: int) -> list[int]:
    """`limit` of the numbers below `count`: both ends, then the middles of the widest gaps."""
    if count <= limit:
        return list(range(count))
    picked, gaps = [0, count - 1], deque([(0, count - 1)])
    while len(picked) < limit:
        low, high = gaps.popleft()
        middle = (low + high) // 2
        if middle != low:
            picked.append(middle)
            gaps += [(low, middle), (middle, high)]
    return picked


def _sample(record: Json, number: int, student: Path) -> Json:
    """A sample as the page has it: log-probs and ranks of the counted tokens alone, the mask as a word of 0s and 1s."""
    ids, mask = record["ids"], record["loss_mask"]
    return {
        "step": record["step"],
        "number": number,
        "truncated": record.get("truncated", False),
        "dataset": record.get("dataset") or "",
        "reward": None if record.get("reward") is None else _plain(record["reward"]),
        "ids": ids,
        "tokens": record.get("tokens") or _texts(student, ids),
        "mask": "".join("01"[bool(counted)] for counted in mask),
        "sampler": _counted(record.get("sampler_logprobs"), mask),
        "teacher": _counted(record.get("teacher_logprobs"), mask),
        "student_ranks": list(compress(record.get("student_ranks") or [], mask)),
        "teacher_ranks": list(compress(record.get("teacher_ranks") or [], mask)),
    }


def _counted(logprobs: Sequence[float] | None, mask: Sequence[bool]) -> list[float | str]:
    return [_plain(round(value, 4)) for value in compress(logprobs or [], mask)]


def _texts(folder: Path, ids: Sequence[int]) -> list[str]:
    """The texts of a record that has none, by the run's own tokenizer; the ids where there is no such tokenizer."""
    tokenizer = _tokenizer(folder / "tokenizer.json")
    if tokenizer is None:
        return [f"⟨{token}⟩" for token in ids]
    return [tokenizer.decode([token], skip_special_tokens=False) for token in ids]


@lru_cache(maxsize=1)
def _tokenizer(file: Path) -> Any:
    """tokenizer.json is data: loading it runs no code, whatever else the folder holds."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # all that the library raises, for no file as for a bad one
        return None
