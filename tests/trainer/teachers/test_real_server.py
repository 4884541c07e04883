"""A real server, started by hand, against the same model here. docs/servers.md has the commands; for example

export FASTKL_SERVER_URL=http://127.0.0.1:8000/v1 FASTKL_SERVER_MODEL=smol FASTKL_SERVER_FOLDER=runs/smollm2/teacher
python -m pytest -m slow tests/trainer/teachers/test_real_server.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from run_settings import arguments
from tiny_data import read_jsonl, write_jsonl

from fastkl import cli

URL, MODEL, FOLDER = (os.environ.get(f"FASTKL_SERVER_{name}", "") for name in ("URL", "MODEL", "FOLDER"))
TOLERANCE = float(os.environ.get("FASTKL_SERVER_TOLERANCE", "1e-3"))  # nats; a 16-bit server needs more

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not URL, reason="no server: FASTKL_SERVER_URL is unset")]


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
def test_scores_are_those_of_the_model_here(tmp_path: Path, api: str) -> None:
    rows = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}, naïvely 🙂."} for n in range(20)]
    shared = {"data.path": write_jsonl(tmp_path / "rows.jsonl", rows)}
    here = {"model.path": FOLDER, "output": tmp_path / "here.jsonl"}
    there = {"model.server.url": URL, "model.server.model": MODEL, "model.server.api": api}
    there |= {"model.tokenizer": FOLDER, "output": tmp_path / "there.jsonl"}
    for options in (here, there):
        assert cli.main(arguments("score", shared | options)) == 0
    for a, b in zip(read_jsonl(tmp_path / "here.jsonl"), read_jsonl(tmp_path / "there.jsonl"), strict=True):
        assert a["ids"] == b["ids"]
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=TOLERANCE)
