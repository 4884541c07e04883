"""The supervised stage: plain cross-entropy on the completions, and a student that distillation can go on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import GEMMA, family_tokenizer
from run_cases import Run, as_optimized, check_equal, distilled, first_moments, interrupt, tuned, weights
from run_settings import Settings, arguments, distillation, evaluated, training
from tiny_data import sums, write_jsonl
from tiny_models import save_model, tokenizer
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer.errors import ConfigError


def run(folder: Path, path: Path, **overrides: object) -> tuple[Path, list[dict[str, Any]]]:
    done = Run.of(tuned(training(path, folder, **{"examples_per_step": 12, **overrides})))
    return done.folder, done.metrics


@pytest.mark.parametrize(
    "options",
    [{}, {"batch__max_tokens": 20}, {"batch__layout": "packed"}, {"batch__max_tokens": 30, "batch__layout": "packed"}],
    ids=["whole", "accumulated", "packed", "packed-accumulated"],
)
def test_a_step_is_the_models_own_cross_entropy(tmp_path: Path, folder: Path, options: dict[str, object]) -> None:
    path, metrics = run(folder, tmp_path / "run", optim__steps=1, optim__max_grad_norm="null", **options)
    words, model = tokenizer(), AutoModelForCausalLM.from_pretrained(folder / "student")
    tokens, total = 0, torch.zeros(())
    for row in sums():
        prompt = words(f"<u>{row['prompt']}<a>")["input_ids"]
        completion = [*words(row["completion"])["input_ids"], words.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        total = total + model(torch.tensor([prompt + completion]), labels=labels).loss * len(completion)
        tokens += len(completion)
    loss = total / tokens
    loss.backward()
    gradients = [parameter.grad for _, parameter in as_optimized(model)]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert metrics[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics[0]["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics[0]["completions/mean_length"] == tokens / len(sums())
    for moment, gradient in zip(first_moments(path), gradients, strict=True):  # after one step: (1 − 0.9) · gradient
        torch.testing.assert_close(moment / 0.1, gradient, atol=1e-5 * norm, rtol=1e-3)


def test_it_learns_the_sums_and_says_so(tmp_path: Path, folder: Path) -> None:
    """Loss to nearly 0 and accuracy to 1 on what it was shown: data, loss, sampler, decoding and grader in one."""
    _, metrics = run(
        folder, tmp_path / "run", optim__steps=80, optim__lr=0.02, **evaluated(folder, eval__max_new_tokens=5)
    )
    assert metrics[0]["eval/accuracy"] < 0.5
    assert metrics[1]["loss"] > 2
    assert metrics[-1]["loss"] < 0.1
    assert metrics[-1]["eval/accuracy"] == 1
    assert metrics[-1]["eval/truncated_fraction"] == 0


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_resume(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, lora_rank: int) -> None:
    steps: Settings = {"optim__steps": 6, "optim__substeps": 2, "checkpoint__every": 2, "examples_per_step": 5}
    options = {"student__lora__rank": lora_rank, **steps}
    settings = training(tmp_path / "run", folder, **options)
    interrupt(monkeypatch, settings, 3, "sft")
    check_equal(tuned(settings), tuned(training(tmp_path / "whole", folder, **options)))


def test_supervised_stage_then_distillation(tmp_path: Path, folder: Path) -> None:
    """The two commands in a row, as a user gives them."""
    first, second = (tmp_path / name for name in ("first", "second"))
    assert cli.main(arguments("sft", training(first, folder, examples_per_step=6, optim__steps=2))) == 0
    settings = distillation(second, folder, student__path=first / "student", optim__steps=2)
    assert cli.main(arguments("distill", settings)) == 0
    before, after = weights(first / "student"), weights(second / "student")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_folder_of_the_other_command_is_refused(tmp_path: Path, folder: Path) -> None:
    path, _ = run(folder, tmp_path / "run", optim__steps=1)
    with pytest.raises(ConfigError, match="holds an sft run, not a distill run"):
        distilled(distillation(path, folder))


def test_rows_without_a_completion_are_named(tmp_path: Path, folder: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [*sums(2), {"prompt": "1"}])
    with pytest.raises(ConfigError, match=r"d\.jsonl:3: no `completion`"):
        run(folder, tmp_path / "run", data__path=data)
    assert not (tmp_path / "run").exists()


def test_room_is_that_of_each_example(tmp_path: Path, folder: Path) -> None:
    """A long prompt and a long completion in two rows fit; together in one they do not."""
    rows = [{"prompt": "1" * 50, "completion": "2"}, {"prompt": "1", "completion": "2" * 50}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    run(folder, tmp_path / "run", data__path=data, examples_per_step=2, optim__steps=1)
    data = write_jsonl(tmp_path / "e.jsonl", [*rows, {"prompt": "1" * 30, "completion": "2" * 40}])
    with pytest.raises(ConfigError, match=r"e\.jsonl:3 has 32 tokens; with 41 new ones"):
        run(folder, tmp_path / "other", data__path=data, examples_per_step=2, optim__steps=1)


def test_a_student_learns_to_end_its_turns_as_the_chat_template_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer has another end of sequence, which neither training nor sampling needs."""
    words = family_tokenizer("gemma", template=GEMMA.replace("{{ bos_token }}", ""))
    save_model(tmp_path / "student", words, eos_token_id=words.eos_token_id)
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "answer": a}
        for q, a in (("1", "2"), ("3", "4"))
    ]
    write_jsonl(tmp_path / "sums.jsonl", chats)
    end, steps = words.convert_tokens_to_ids("<end_of_turn>"), {"optim__steps": 20, "optim__lr": 0.02}
    path, metrics = run(tmp_path, tmp_path / "run", **steps, examples_per_step=2, **evaluated(tmp_path))
    assert (metrics[-1]["eval/accuracy"], metrics[-1]["eval/truncated_fraction"]) == (1, 0)
    assert metrics[-1]["eval/mean_length"] == 2  # the digit and the end of the turn
    model = AutoModelForCausalLM.from_pretrained(path / "student")
    assert end in model.generation_config.eos_token_id
    command = arguments(
        "eval", {"model.path": path / "student", "eval.data.path": tmp_path / "sums.jsonl", "eval.max_new_tokens": 8}
    )
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["eval/mean_length"] == 2
