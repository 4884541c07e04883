"""The task: five letters stand in any order, each with a number; the answer has them in theirs, `a is 964, b is 494, …`."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from fastkl.trainer.data.rows import Prompt

LETTERS = "abcde"


def rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Prompts with a right completion each: forwards or backwards, as a coin falls."""
    rng = random.Random(seed)
    for _ in range(count):
        numbers = {letter: rng.randint(100, 999) for letter in LETTERS}
        shuffled = rng.sample(LETTERS, len(LETTERS))
        written = LETTERS if rng.random() < 0.5 else LETTERS[::-1]
        yield {
            "prompt": " ".join(f"{letter}{numbers[letter]}" for letter in shuffled) + "\n",
            "completion": ", ".join(f"{letter} is {numbers[letter]}" for letter in written),
            "answer": " ".join(f"{letter}{numbers[letter]}" for letter in LETTERS),
        }


def right(completion: str, row: Prompt) -> float:
    """A grader: the share of the letters that are named once, with the right number."""
    said = re.findall(r"\b([a-z]) is (\d+)", completion)
    numbers = re.findall(r"([a-z])(\d+)", row.answer or "")
    letters = [letter for letter, _ in said]
    return sum(pair in said and letters.count(pair[0]) == 1 for pair in numbers) / len(numbers)
