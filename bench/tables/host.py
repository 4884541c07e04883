"""The tables of what a step's samples, and a run's prompts, cost on the host."""

from __future__ import annotations

from bench.lib.markdown import table
from bench.lib.report import read_result

PARTS = ("scatter", "advantages", "batch", "log", "step")
FORMS = {"host-lists": "lists", "host": "arrays"}


def samples() -> str:
    """Bytes and CPU time of a token, as samples hold arrays, and as they held lists."""
    reports = {form: read_result(name) for name, form in FORMS.items()}
    rows = [
        [form, f"{row['tokens']:,}", f"{row['bytes']:.0f}", *(f"{row[part]:.2f}" for part in PARTS)]
        for form, report in reports.items()
        for row in report["rows"]
    ]
    header = ["samples hold", "tokens of a step", "bytes a token", *PARTS[:-1], "together"]
    return table(header, rows, "µs of CPU time a token, without a model", reports.values())


def prompts() -> str:
    """Memory of a run's prompts, and CPU time at its start."""
    report = read_result("host")
    rows = [
        [
            f"{row['prompts']:,}",
            *(f"{row[name] / 1e6:.0f}" for name in ("held", "peak")),
            *(f"{row[name]:.1f}" for name in ("read", "encode", "fingerprint")),
            f"{row['access']:.2f}",
        ]
        for row in report["prompts"]
    ]
    header = ["prompts", "held, MB", "at the peak, MB", "reading, s", "encoding, s", "fingerprint, s", "512 rows, s"]
    last = report["prompts"][-1]
    tokens, characters = last["tokens"], last["characters"]
    said = f"Prompts of 200 to 600 characters, {tokens:.0f} tokens on average; {characters:.0f} characters a row"
    return table(header, rows, said, [report])


TABLES = {"host-samples": samples, "host-prompts": prompts}
