"""Runs of students that do something of their own: what they learn from is what they sampled, what is saved is theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from odd_models import ODD
from run_cases import WORDS, log, refusal, run, tuned
from run_settings import training
from tiny_data import sums, write_jsonl
from tiny_models import causal_lm, tokenizer

OWN = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": 0}
# Kind, options, what its config must have kept.
SELF: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("gpt2", {}, {"attn_pdrop": 0.1, "resid_pdrop": 0.1}),
    "gpt2-checkpointing": ("gpt2", {"student__gradient_checkpointing": "true"}, {"embd_pdrop": 0.1}),
    "gpt2-lora": ("gpt2", {"student__lora__rank": 2}, {"embd_pdrop": 0.1}),
    "opt-checkpointing": ("opt", {"student__gradient_checkpointing": "true"}, {"dropout": 0.1}),
    "granite": ("granite", {}, {"attention_dropout": 0.2}),
    "router-logits": ("qwen3_moe", {}, {"output_router_logits": True}),
    "router-logits-lora": ("qwen3_moe", {"student__lora__rank": 2}, {"output_router_logits": True}),
    "router-noise": ("phimoe", {}, {"input_jitter_noise": 0.1}),
    "rwkv": ("rwkv", {}, {"rescale_every": 6}),
    "minimax": ("minimax", {}, {}),
}
FEW = ("gpt2", "router-logits")


def folder_of(path: Path, kind: str) -> Path:
    """A model of this kind as student and teacher, and sums."""
    settings = {**ODD[kind], **OWN}
    model = causal_lm(kind, settings.pop("attention", "sdpa"), **settings)
    for name in ("student", "teacher"):
        model.save_pretrained(path / name)
        tokenizer().save_pretrained(path / name)
    write_jsonl(path / "sums.jsonl", sums())
    return path


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in SELF])
def test_a_student_of_its_own_has_nothing_to_learn(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, options, kept = SELF[name]
    small = {"loss__objective": "reverse_kl", "optim__lr": 0.0, "optim__steps": 1}
    done = run(tmp_path / "run", folder_of(tmp_path, kind), **small, **options)
    (row,) = done.metrics
    assert row["loss"] == pytest.approx(0, abs=1e-5)
    assert row["sampler_mismatch/mean_abs"] < 1e-5
    config = json.loads((tmp_path / "run" / "student" / "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in kept} == kept
    assert ("auxiliary loss is left out of a distillation" in capsys.readouterr().err) == ("router-logits" in name)


def test_dropout_that_is_kept(tmp_path: Path) -> None:
    done = run(tmp_path / "run", folder_of(tmp_path, "gpt2"), student__dropout="keep", optim__lr=0.0, optim__steps=1)
    assert done.metrics[0]["sampler_mismatch/mean_abs"] > 0.05


def test_sft_of_a_model_that_asks_for_its_routers_loss_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, "qwen3_moe")
    settings = training(tmp_path / "run", folder, examples_per_step=4, optim__steps=1)
    refusal(capsys, "sft", settings, "output_router_logits: true", "sft does not add it", "config.json")
    file = folder / "student" / "config.json"
    file.write_text(
        file.read_text(encoding="utf-8").replace('"output_router_logits": true', '"output_router_logits": false')
    )
    assert log(tuned(settings))
