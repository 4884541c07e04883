"""A plugin of pytest: what the tests came to, as JSON that is written anew after each test.

BENCH_TESTS_JSON=tests.json python -m pytest -p bench.lib.pytest_record
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fastkl._check.json_file import write_json

WIDTH = 300  # of a failure's last line


class Record:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": 0, "failures": [], "complete": False}
        write_json(file, self.found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a setup counts if it is the end of a test
            self.found[report.outcome] += 1
            if report.failed:
                lines = [line for line in report.longreprtext.splitlines() if line.strip()]
                self.found["failures"].append({"test": report.nodeid, "error": "\n".join(lines[-2:])[-WIDTH:]})
            write_json(self.file, self.found)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.found["complete"] = not session.shouldstop
        write_json(self.file, self.found)


def pytest_configure(config: pytest.Config) -> None:
    """With workers, their controller alone writes."""
    file = os.environ.get("BENCH_TESTS_JSON")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(file)))
