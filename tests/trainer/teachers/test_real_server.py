"""A real server, started by hand, against the same model here. docs/teachers/servers.md has the commands; for example

export FASTKL_SERVER_URL=http://127.0.0.1:8000/v1 FASTKL_SERVER_MODEL=smol FASTKL_SERVER_FOLDER=runs/smollm2/teacher
python -m pytest -m slow tests/trainer/teachers/test_real_server.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from run_cases import check_scores
from tiny_data import write_jsonl

URL, MODEL, FOLDER = (os.environ.get(f"FASTKL_SERVER_{name}", "") for name in ("URL", "MODEL", "FOLDER"))
TOLERANCE = float(os.environ.get("FASTKL_SERVER_TOLERANCE", "1e-3"))  # nats; a 16-bit server needs more

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not URL, reason="no server: FASTKL_SERVER_URL is unset")]


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
def test_scores_are_those_of_the_model_here(tmp_path: Path, api: str) -> None:
    rows = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}, naïvely 🙂."} for n in range(20)]
    server = {"model.server.url": URL, "model.server.model": MODEL, "model.server.api": api, "model.tokenizer": FOLDER}
    check_scores(tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows), {"model.path": FOLDER}, server, TOLERANCE)
