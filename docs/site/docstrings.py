"""Docstrings as Markdown. They are written for `help()`: arguments in columns, formulas indented."""

from __future__ import annotations

import re
from collections.abc import Iterator

ITEM = re.compile(r"( *)([\w*]+(?:, [\w*]+)*)( {2,})(\S.*)")  # an argument, a gap, what it means
FORMULA = 4  # spaces


def markdown(docstring: str) -> str:
    """Columns become definition lists. Formulas keep their lines."""
    return "\n".join(_lines(docstring.splitlines())) + "\n"


def _lines(lines: list[str]) -> Iterator[str]:
    inside = None  # the indent of the list that a line may go on
    before = ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        item = ITEM.fullmatch(line)
        if item and (inside is None or indent <= inside):
            inside = indent
            yield from ("", f"`{item[2]}`", f":   {_plain(item[4])}")
        elif inside is not None and indent > inside and line.strip():
            yield f"    {_plain(line.strip())}"
        else:
            if inside is not None and line.strip():
                inside = None
                yield ""
            if indent >= FORMULA and before.strip() and len(before) - len(before.lstrip()) < FORMULA:
                yield ""  # a formula right after a sentence
            yield line
        before = line


def _plain(text: str) -> str:
    """Text that begins with "> 0" or "1." is no quotation and no list."""
    return re.sub(r"^(\d+)\.|^(?=[>#+-])", lambda found: f"{found[1]}\\." if found[1] else "\\", text)
