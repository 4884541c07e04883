"""Code in documents."""

from __future__ import annotations

import re
from pathlib import Path


def blocks(document: Path, section: str = "") -> list[str]:
    """The Python code of a document, or of one of its sections."""
    text = document.read_text(encoding="utf-8")
    if section:
        text = re.split(rf"^## {re.escape(section)}$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
