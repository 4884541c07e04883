"""The recipe's data: the demo's sums of three digits, with solutions of three kinds, and its untrained models."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "demo"))

from arithmetic import HELD_OUT, INSTRUCTION, problems, solution, write_model
from series import Row, write_rows

VALIDATION = 250  # problems that choose learning rates and steps
COPIES = {"careless": 4, "styled": 5}  # solutions of each problem
LAYERS = {"teacher": 3, "student": 2}
STYLES = ("running total", "rest carried along", "from the right")


def write_data(folder: Path) -> None:
    """test.jsonl, validation.jsonl; plain.jsonl, careless.jsonl, styled.jsonl with solutions of all other problems."""
    if (folder / "student").exists():  # written last
        return
    drawn = problems()
    parts = {"test": drawn[:HELD_OUT], "validation": drawn[HELD_OUT : HELD_OUT + VALIDATION]}
    learned = drawn[HELD_OUT + VALIDATION :]
    for name, part in parts.items():
        write_rows(folder / f"{name}.jsonl", ({"prompt": text, "answer": answer} for text, _, answer in part))
    write_rows(folder / "plain.jsonl", (_row(text, work, answer) for text, work, answer in learned))
    rng = random.Random(0)
    write_rows(folder / "careless.jsonl", (_row(t, solution(t, rng), a) for t, a in _copies(learned, "careless")))
    write_rows(folder / "styled.jsonl", (_row(t, styled(t, rng), a) for t, a in _copies(learned, "styled")))
    for name, layers in LAYERS.items():
        write_model(folder / name, layers)


def styled(question: str, rng: random.Random) -> str:
    """A right solution in two lines, in one of `STYLES`; the first two operands of a line swap places half of the time."""
    expression = question.removeprefix(INSTRUCTION).removesuffix("=").split()
    first, second, third = (
        int(term) if sign == "+" else -int(term)
        for sign, term in zip(["+", *expression[1::2]], expression[::2], strict=True)
    )
    style = rng.choice(STYLES)
    if style == "running total":
        lines = [((first, second), ()), ((first + second, third), ())]
    elif style == "rest carried along":
        lines = [((first, second), (third,)), ((first + second, third), ())]
    else:
        lines = [((second, third), ()), ((first, second + third), ())]
    return "\n".join(_line(pair, rest, rng) for pair, rest in lines)


def _line(pair: tuple[int, int], rest: tuple[int, ...], rng: random.Random) -> str:
    left, right = pair if rng.random() < 0.5 else pair[::-1]
    more = "".join(map(_term, rest))
    return f"{left}{_term(right)}{more} = {left + right}{more}"


def _term(number: int) -> str:
    return f" + {number}" if number >= 0 else f" - {-number}"


def _copies(rows: list[tuple[str, str, str]], kind: str) -> Iterator[tuple[str, str]]:
    return ((text, answer) for _ in range(COPIES[kind]) for text, _, answer in rows)


def _row(prompt: str, completion: str, answer: str) -> Row:
    return {"prompt": prompt, "completion": completion, "answer": answer}
