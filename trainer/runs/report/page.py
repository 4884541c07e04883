"""`fastkl report`: one self-contained HTML page about one run, or about several on the same axes.

The page is trainer/report/html/: a template, a style sheet and scripts, put into one file with the runs as JSON.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from fastkl.trainer.config.offline import ReportConfig
from fastkl.trainer.data.samples import UNKNOWN
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.metrics import figures
from fastkl.trainer.runs.files import write_text
from fastkl.trainer.runs.report.curves import merged
from fastkl.trainer.runs.report.data import differences, run_data, run_names

NAME = "report.html"
PAGE = Path(__file__).parent / "html"
SCRIPTS = ("elements.js", "tables.js", "curves.js", "segments.js", "completions.js")
MARK = '<meta name="generator" content="fastkl report">'  # in page.html: what makes a file ours to replace
SAMPLE_BYTES = 3_000_000  # of a page, all runs together


def report(config: ReportConfig) -> None:
    """Writes the page that the command asks for."""
    path = write_report([Path(run) for run in config.runs], None if config.output is None else Path(config.output))
    print(f"report written to {path}")


def report_of(run: Path) -> str:
    """Writes a finished run's report.html, and says where it is. It never fails the run: it says why there is none."""
    try:
        return f"report in {write_report([run])}"
    except Exception as error:
        again = shlex.join(["fastkl", "report", str(run)])
        return f"no report was written ({type(error).__name__}: {error}); `{again}` tries again"


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page, NAME in the first run's folder unless told otherwise."""
    path = runs[0] / NAME if output is None else output
    _check_output(path)
    page = render(
        [run_data(run, name, SAMPLE_BYTES // len(runs)) for run, name in zip(runs, run_names(runs), strict=True)]
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise ConfigError(f"output {path} cannot be written ({error.strerror}); choose another one") from error
    return path


def render(runs: Sequence[dict[str, Any]]) -> str:
    """The page as text. What the runs hold reaches it as JSON without a `<`, and the title's text escaped."""
    names = {name for run in runs for name in run["series"]}
    data = {"runs": runs, "differences": differences(runs), "unknown": UNKNOWN, "figures": merged(figures(names), runs)}
    script = "\n".join(file.read_text(encoding="utf-8") for file in (PAGE / name for name in SCRIPTS))
    page = Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(", ".join(run["name"] for run in runs)),
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates, from names that are not UTF-8


def _check_output(path: Path) -> None:
    """Refuses to replace anything but an older report."""
    if path.is_dir():
        raise ConfigError(f"output {path} is a folder; name a file, for example {path / 'report.html'}")
    if path.exists() and MARK.encode() not in path.read_bytes()[:1000]:
        raise ConfigError(
            f"output {path} exists already and is no report of fastkl's; move it away or choose another name"
        )
