"""Aligned texts, as lines for a reader."""

from __future__ import annotations

from collections.abc import Sequence

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes

SEGMENT = "│"  # ends a segment
TOKEN = "·"  # ends a token inside one
NONE = "✗"  # marks a token in none


def line(ids: Sequence[int], segments: Array, written: TokenBytes) -> str:
    """The tokens of a text, with marks between them. `segments`: the number of each token's, 0: none."""
    parts = []
    for place, (token, number) in enumerate(zip(ids, segments, strict=True)):
        if place:
            parts.append(TOKEN if number and number == segments[place - 1] else SEGMENT)
        text = written[int(token)].decode("utf-8", "backslashreplace").replace("\n", "↵")
        parts.append(text if number else f"{text}{NONE}")
    return "".join(parts)
