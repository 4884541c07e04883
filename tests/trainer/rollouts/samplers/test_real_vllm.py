"""Rollouts by a real vLLM server, which the test starts: a few steps of all weights, of a model whose head is the
embeddings and of one with a head of its own, and of a LoRA adapter. Minutes each.

python recipes/smollm2/make.py   # the models, once
FASTKL_VLLM=vv/bin/python python -m pytest -m slow -s tests/trainer/rollouts/samplers/test_real_vllm.py

FASTKL_VLLM is the Python of an environment with vLLM (docs/teachers/servers.md); SmolLM2 in float32 on a CPU needs 4 GB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from real_vllm import serving_vllm
from run_settings import arguments
from tiny_data import read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkl import cli

PYTHON = os.environ.get("FASTKL_VLLM", "")
MODELS = Path("runs/smollm2").resolve()
TOLERANCE = 1e-3  # nats, of log-probs of the server and of the trainer, both in float32
SAMPLING = "--logprobs-mode processed_logprobs --enable-lora --max-lora-rank 16"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no vLLM: FASTKL_VLLM is unset"),
    pytest.mark.skipif(not MODELS.is_dir(), reason="no models: run recipes/smollm2/make.py"),
]


@pytest.fixture
def student(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """SmolLM2 as it is, or with a head of its own."""
    if request.param == "embeddings":
        return MODELS / "student"
    folder = tmp_path_factory.mktemp("student")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "student", tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODELS / "student").save_pretrained(folder)
    return folder


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Iterator[str]:
    """A server of the student, as docs/teachers/servers.md starts one; a test leaves its own weights in it."""
    with serving_vllm([PYTHON], student, "smol", tmp_path_factory.mktemp("server"), SAMPLING) as address:
        yield address


@pytest.mark.parametrize(
    ("student", "rank"),
    [("embeddings", 0), ("own", 0), ("embeddings", 8)],
    indirect=["student"],
    ids=["full-tied", "full-untied", "lora-tied"],
)
def test_rollouts_are_on_policy(tmp_path: Path, student: Path, url: str, rank: int) -> None:
    run: dict[str, object] = {
        "run": tmp_path / "run",
        "student.path": student,
        "student.lora.rank": rank,
        "teacher.path": MODELS / "teacher",
        "data.path": MODELS / "prompts.jsonl",
        "data.max_prompt_tokens": 120,
        "sampling.prompts_per_step": 4,
        "sampling.max_new_tokens": 12,
        "sampling.temperature": 0.8,
        "sampling.server.url": url,
        "sampling.server.model": "smol",
        "sampling.server.timeout": 600,  # the first request compiles
        "optim.steps": 3,
        "optim.lr": 1e-4 if rank == 0 else 1e-3,
    }
    assert cli.main(arguments("distill", run)) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    for row in rows:
        print(json.dumps(row))
        assert row["sampler_mismatch/mean_abs"] < TOLERANCE
    assert len({row["teacher_kl"] for row in rows}) == 3
