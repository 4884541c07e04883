"""Tables in Markdown, with the circumstances of their figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
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


def means(values: Sequence[float], form: str) -> str:
    """The mean of the seeds, and in brackets each of them where there are several."""
    return f"{fmean(values):{form}}{f' ({each(values, form)})' if len(values) > 1 else ''}"


def with_error(values: Sequence[float], form: str) -> str:
    """The mean of the seeds, and its standard error where there are several."""
    error = f" ± {stdev(values) / len(values) ** 0.5:{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{error}"


def each(values: Iterable[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in (header, *rows))
    return f"{head}{'|---' * len(header)}|\n{''.join(body)}"
