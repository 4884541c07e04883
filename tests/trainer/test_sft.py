"""The supervised stage: plain cross-entropy on the completions, and a student that distillation can go on with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import GEMMA, family_tokenizer
from launches import together
from run_cases import PEERS, Run, as_optimized, check_equal, distilled, first_moments, interrupt, log, tuned, weights
from run_settings import Settings, arguments, config, distillation, evaluated, training
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import save_model, tokenizer
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.folder import check_run_folder


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


def mixture(tmp_path: Path, folder: Path, run: str = "run", **overrides: object) -> Settings:
    """Settings of a run on the folder's sums, and on half as many chats."""
    chats = [{"prompt": f"hello {number}?", "completion": str(number)} for number in range(4)]
    chat = {"data": {"path": str(write_jsonl(tmp_path / "chats.jsonl", chats))}}
    entries = {"sums": {"data": {"path": str(folder / "sums.jsonl")}, "weight": 2}, "chat": chat}
    options: Settings = {"data__path": "null", "mixture": json.dumps(entries), "examples_per_step": 5}
    return training(tmp_path / run, folder, **(options | overrides))


def test_each_data_set_of_a_mixture_has_its_share(tmp_path: Path, folder: Path) -> None:
    """Every row of a data set comes once before any comes twice, with its own completion."""
    settings = mixture(tmp_path, folder, examples_per_step=6, optim__steps=2)
    samples = read_jsonl(tuned(settings) / "samples.jsonl")
    by_step = [Counter(sample["dataset"] for sample in samples if sample["step"] == step) for step in (1, 2)]
    assert by_step == [{"sums": 4, "chat": 2}, {"sums": 4, "chat": 2}]
    words, chats = tokenizer(), read_jsonl(tmp_path / "chats.jsonl")
    rows = [*((row, "chat") for row in chats), *((row, "sums") for row in sums())]  # data sets by name
    assert sorted(sample["prompt_index"] for sample in samples if sample["dataset"] == "chat") == [0, 1, 2, 3]
    assert len({sample["prompt_index"] for sample in samples}) == 12
    for sample in samples:
        row, dataset = rows[sample["prompt_index"]]
        wanted = [*words(row["completion"])["input_ids"], words.eos_token_id]
        assert (sample["dataset"], sample["ids"][-len(wanted) :]) == (dataset, wanted)


def test_one_data_set_of_a_mixture_is_the_run_without_one(tmp_path: Path, folder: Path) -> None:
    alone, _ = run(folder, tmp_path / "alone", optim__steps=1)
    entries = json.dumps({"sums": {"data": {"path": str(folder / "sums.jsonl")}, "weight": 3}})
    mixed, _ = run(folder, tmp_path / "mixed", optim__steps=1, data__path="null", mixture=entries)
    (found,), (wanted,) = log(mixed), log(alone)  # all rows, in another order
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_mixture_resumes_in_the_middle(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: Settings = {"optim__steps": 4, "optim__substeps": 2, "checkpoint__every": 2}
    settings = mixture(tmp_path, folder, **steps)
    interrupt(monkeypatch, settings, 3, "sft")
    other = settings | {"mixture.chat.weight": 3}
    with pytest.raises(ConfigError, match=r"Within a run mixture\.chat\.weight cannot change"):
        check_run_folder(config("sft", other))
    rows = (tmp_path / "chats.jsonl").read_text()
    write_jsonl(tmp_path / "chats.jsonl", [{"prompt": "bye?", "completion": "1"}])
    assert cli.main(arguments("sft", settings)) == 2
    assert "the rows of mixture.chat.data changed since the run began" in capsys.readouterr().err
    (tmp_path / "chats.jsonl").write_text(rows)
    check_equal(tuned(settings), tuned(mixture(tmp_path, folder, "whole", **steps)))


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"data.path": "d.jsonl"}, ["data.path is 'd.jsonl'", "mixture has the data sets sums, chat"]),
        ({"mixture.chat.weight": 0}, ["mixture.chat.weight is 0", "> 0"]),
        ({"mixture.chat.data.path": "null"}, ["mixture.chat.data.path is None", "exactly one"]),
        ({"mixture.chat.teacher.path": "t"}, ["mixture.chat.teacher.path is no setting"]),
    ],
    ids=str,
)
def test_refused_mixtures(
    tmp_path: Path, folder: Path, more: Settings, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments("sft", mixture(tmp_path, folder) | more)) == 2
    error = capsys.readouterr().err
    assert [part for part in parts if part not in error] == [], error


def test_rows_of_a_mixture_are_checked(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each data set by itself, before a folder is made; the dry run counts all of them."""
    settings = mixture(tmp_path, folder)
    assert cli.main([*arguments("sft", settings), "--dry-run"]) == 0
    assert "16 prompts of" in capsys.readouterr().out
    data = tmp_path / "chats.jsonl"
    for row, said in (
        ({"prompt": "1"}, "no `completion`"),
        ({"prompt": "1" * 60, "completion": "2" * 60}, "context of"),
    ):
        write_jsonl(data, [{"prompt": "1", "completion": "2"}, row])
        for words in ([], ["--dry-run"]):
            assert cli.main([*arguments("sft", settings), *words]) == 2
            error = capsys.readouterr().err
            assert "chats.jsonl:2" in error
            assert said in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", PEERS.values(), ids=PEERS)
def test_a_mixture_in_two_processes(tmp_path: Path, folder: Path, fsdp: bool) -> None:
    steps: Settings = {"optim__substeps": 2, "batch__max_tokens": 40}
    one = tuned(mixture(tmp_path, folder, "one", **steps))
    codes, said = together(arguments("sft", mixture(tmp_path, folder, "two", **steps)), tmp_path / "said", fsdp=fsdp)
    assert codes == [0, 0], said
    for found, wanted in zip(log(tmp_path / "two"), log(one), strict=True):
        assert found == pytest.approx(wanted, rel=2e-4, abs=1e-5)
    samples = [read_jsonl(path / "samples.jsonl") for path in (tmp_path / "two", one)]
    assert samples[0] == samples[1]
    ours, theirs = weights(tmp_path / "two" / "student"), weights(one / "student")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-4, rtol=2e-4)


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
    with pytest.raises(ConfigError, match="holds a distill run, not an sft run"):  # a mixture is a setting of both
        tuned(mixture(tmp_path, folder) | {"run": distilled(distillation(tmp_path / "other", folder, optim__steps=1))})


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
