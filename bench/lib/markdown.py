"""Tables in Markdown, with the circumstances of their figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.lib.report import counted

Report = dict[str, Any]


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], conditions: str, reports: Iterable[Report], *packages: str
) -> str:
    """Markdown, then what the figures are of, in sentences. The reports come from one machine and one set of versions."""
    text, reports = markdown(header, rows), list(reports)
    (machine,) = {f"{r['machine']['cpu']} ({counted(r['machine']['threads'], 'thread')})" for r in reports}
    (versions,) = {", ".join(f"{p} {r['versions'][p]}" for p in packages or ("torch",)) for r in reports}
    dates = ", ".join(sorted({r["date"][:10] for r in reports}))
    return f"{text}\n{conditions}.\nMeasured {dates} on {machine} with {versions}.\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in (header, *rows))
    return f"{head}{'|---' * len(header)}|\n{''.join(body)}"
