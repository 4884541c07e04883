"""Named functions that score a completion against the answer: 1 for right, 0 for wrong. A new one is an entry here."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

Grader = Callable[[str, str], float]

# 1234, 1,234 (but "1,2" is two numbers), 1.5 and .5, with a sign
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")
_BOXED = r"\boxed{"


def last_number(completion: str, answer: str) -> float:
    """Exact match of the last number in the completion with the (last) number of the answer; commas are ignored."""
    found, wanted = _NUMBER.findall(completion), _NUMBER.findall(answer)
    if not found or not wanted:
        return 0.0
    return float(_as_number(found[-1]) == _as_number(wanted[-1]))


def boxed(completion: str, answer: str) -> float:
    r"""Exact match of the last `\boxed{...}` with the answer, as numbers where both are, else as text without spaces."""
    content = _last_boxed(completion)
    if content is None:
        return 0.0
    wanted = _last_boxed(answer) or answer
    if _NUMBER.fullmatch(content.strip()) and _NUMBER.fullmatch(wanted.strip()):
        return float(_as_number(content) == _as_number(wanted))
    return float("".join(content.split()) == "".join(wanted.split()))


GRADERS: dict[str, Grader] = {"last_number": last_number, "boxed": boxed}


def _as_number(text: str) -> Decimal:  # exact, where a float is not: integers beyond 2⁵³
    return Decimal(text.strip().replace(",", ""))


def _last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, braces inside it balanced; None without one."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None
