"""How to install what an extra of fastkl needs."""

from __future__ import annotations

import re
import shlex
from importlib import metadata


def install_command(extra: str) -> str:
    """Names the extra's packages, not the extra: fastkl itself need not be on an index."""
    try:
        lines = metadata.requires("fastkl") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return f"in the checkout, pip install -e '.[{extra}]'"
    parts = [line.partition(";") for line in lines]
    names = [name.strip() for name, _, marker in parts if re.search(rf"extra == ['\"]{extra}['\"]", marker)]
    return f"pip install {' '.join(map(shlex.quote, names))}"
