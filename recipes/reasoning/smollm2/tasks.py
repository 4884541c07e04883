"""Three tasks of reasoning-gym, with solutions worked out line by line: sums, equations, words spelt backward."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import reasoning_gym

Problem = dict[str, Any]  # a row of reasoning-gym: question, answer, metadata
HELD_OUT, TRAINING, TEST = 32, 1000, 128  # problems of each task
_EQUATION = re.compile(r"(?:(\d+) - )?(\d+)\*(\w)(?: ([+-]) (\d+))? = (-?\d+)")


def write_data(folder: Path) -> None:
    """train.jsonl (prompt, worked completion, answer), heldout.jsonl and test.jsonl: different problems in each."""
    drawn = [_problems(task) for task in TASKS]
    first, last = HELD_OUT + TRAINING, HELD_OUT + TRAINING + TEST
    parts = {"heldout": slice(HELD_OUT), "train": slice(HELD_OUT, first), "test": slice(first, last)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        rows = [row for problems in drawn for row in problems[part]]
        if name == "train":
            random.Random(0).shuffle(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def sum_steps(problem: Problem) -> Iterator[str]:
    """23 + 60 - 71: "23 + 60 = 83", "83 - 71 = 12"."""
    first, *rest = problem["metadata"]["expression"].split()
    total = int(first)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        new = total + int(term) * (1 if sign == "+" else -1)
        yield f"{total} {sign} {term} = {new}"
        total = new


def equation_steps(problem: Problem) -> Iterator[str]:
    """4*h - 3 = 41: "4*h = 41 + 3 = 44", "h = 44 / 4 = 11"; and 26 - 18*t = -64: "18*t = 26 + 64 = 90", and so on."""
    found = _EQUATION.fullmatch(problem["metadata"]["equation"])
    if found is None:
        raise ValueError(f"no a*x + b = c and no a - b*x = c: {problem['metadata']['equation']}")
    minuend, factor, unknown, sign, constant, right = found.groups()
    product = int(factor) * int(problem["answer"])
    if minuend is not None:
        yield f"{factor}*{unknown} = {minuend} {'-' if int(right) >= 0 else '+'} {abs(int(right))} = {product}"
    elif sign is not None:
        yield f"{factor}*{unknown} = {right} {'-' if sign == '+' else '+'} {constant} = {product}"
    yield f"{unknown} = {product} / {factor} = {problem['answer']}"


def spelling_steps(problem: Problem) -> Iterator[str]:
    """sun: "s u n", "n u s"."""
    word = problem["metadata"]["word"]
    yield " ".join(word)
    yield " ".join(reversed(word))


TASKS: dict[str, tuple[dict[str, int], Callable[[Problem], Iterator[str]]]] = {
    "chain_sum": ({"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2}, sum_steps),
    "simple_equations": ({"min_terms": 2, "max_terms": 2, "min_value": 2, "max_value": 20}, equation_steps),
    "spell_backward": ({"min_word_len": 3, "max_word_len": 6}, spelling_steps),
}


def _problems(task: str) -> list[Problem]:
    """Different problems of a task, in the data set's order."""
    settings, steps = TASKS[task]
    drawn = {row["question"]: row for row in reasoning_gym.create_dataset(task, size=4000, seed=1, **settings)}
    return [
        {
            "prompt": question,
            "completion": "\n".join([*steps(row), f"<answer>{row['answer']}</answer>"]),
            "answer": row["answer"],
            "metadata": row["metadata"],
        }
        for question, row in drawn.items()
    ]
