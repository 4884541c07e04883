"""A run's samples as the page has them: of steps spread over the run, of bounded size."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

from fastkl.trainer.runs.report.curves import Json, plain
from fastkl.trainer.runs.report.samples_log import NAME, find_records, read_records
from fastkl.trainer.runs.report.segments import segments_of

STEPS = 40  # whose samples are shown
SAMPLES = 8  # of a step


def page_samples(path: Path, limit: int) -> Json:
    """Samples of steps spread over the run, while they fit, and how many there are in all."""
    log = path / NAME
    lines = find_records(log)
    steps, shown = sorted(lines), list[Json]()
    for step in [steps[index] for index in spread(len(steps), STEPS)]:
        for number, record in enumerate(read_records(log, lines[step][:SAMPLES])):
            sample = _sample(record, number, path / "student")
            size = len(json.dumps(sample, ensure_ascii=False).encode("utf-8", errors="replace"))
            if size <= limit:
                limit -= size
                shown.append(sample)
    shown.sort(key=lambda sample: (sample["step"], sample["number"]))
    return {"shown": shown, "steps": len(steps), "count": sum(map(len, lines.values()))}


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
        "reward": None if record.get("reward") is None else plain(record["reward"]),
        "ids": ids,
        "tokens": record.get("tokens") or _texts(student, ids),
        "mask": "".join("01"[bool(counted)] for counted in mask),
        "sampler": _counted(record.get("sampler_logprobs"), mask),
        "teacher": _counted(record.get("teacher_logprobs"), mask),
        "plain": _counted(record.get("plain_logprobs"), mask),
        "read": record.get("teacher_text"),
        "read_tokens": len(record.get("teacher_prompt") or []),
        "student_ranks": list(compress(record.get("student_ranks") or [], mask)),
        "teacher_ranks": list(compress(record.get("teacher_ranks") or [], mask)),
        "own": segments_of(record) if record.get("teacher_tokens") is not None else None,
    }


def _counted(logprobs: Sequence[float] | None, mask: Sequence[bool]) -> list[float | str]:
    return [plain(round(value, 4)) for value in compress(logprobs or [], mask)]


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
