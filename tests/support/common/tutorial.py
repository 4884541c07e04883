"""Runs the code of a page, block by block, and puts what it prints into the page.

python tests/support/common/tutorial.py docs/start/tutorial.md
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"```python\n(.*?)```(\n\n```text\n(.*?)```)?", re.DOTALL)


def played(text: str) -> str:
    """The page with the outputs of its code."""
    names: dict[str, Any] = {}

    def play(block: re.Match[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(block[1], "a page", "exec"), names)
        assert bool(said.getvalue()) == (block[2] is not None), block[1]
        return f"```python\n{block[1]}```" + (f"\n\n```text\n{said.getvalue()}```" if block[2] else "")

    return BLOCK.sub(play, text)


def outputs(text: str) -> list[str]:
    return [block[3] for block in BLOCK.finditer(text) if block[2]]


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(played(page.read_text(encoding="utf-8")), encoding="utf-8")
