"""`fastkl eval` and `fastkl score`: numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_settings import arguments
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import tokenizer
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.grading.graders import GRADERS
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler


def evaluation(folder: Path, **overrides: object) -> list[str]:
    settings: dict[str, object] = {"model.path": folder / "student", "eval.data.path": folder / "sums.jsonl"}
    return arguments("eval", settings | {"eval.max_new_tokens": 6} | overrides)


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """Standard output is one line of JSON and nothing else: it can be piped."""
    return json.loads(capsys.readouterr().out)


def test_accuracy_is_the_share_of_right_answers(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sampler that knows every third answer, ends there, and runs out of tokens on the others."""
    words = tokenizer()

    def rigged(self: Any, prompts: list[list[int]], **options: Any) -> list[Completion]:
        assert options == {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
        completions = []
        for index, (prompt, row) in enumerate(zip(prompts, sums(), strict=True)):
            assert prompt == words(f"<u>{row['prompt']}<a>")["input_ids"]
            text = f"= {row['answer']}" if index % 3 == 0 else "no way"
            end = [0] if index % 3 == 0 else []
            completions.append(Completion(words(text)["input_ids"] + end, [], not end))
        return completions

    monkeypatch.setattr(GenerateSampler, "sample", rigged)
    output = tmp_path / "new" / "folder" / "answers.jsonl"
    assert cli.main(evaluation(folder, output=output)) == 0
    metrics = printed(capsys)
    answers = read_jsonl(output)
    assert metrics["eval/accuracy"] == 4 / 12
    assert metrics["eval/truncated_fraction"] == 8 / 12
    assert [answer["score"] for answer in answers] == [1.0, 0.0, 0.0] * 4
    for line, (answer, row) in enumerate(zip(answers, sums(), strict=True), start=1):
        assert answer["source"] == f"{folder / 'sums.jsonl'}:{line}"
        assert (answer["prompt"], answer["answer"]) == (row["prompt"], row["answer"])
        assert "<eos>" not in answer["completion"]


def test_the_named_grader_gets_text_and_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def grader(completion: str, answer: str) -> float:
        seen.append((completion, answer))
        return 0.25

    monkeypatch.setitem(GRADERS, "quarter", grader)
    assert cli.main(evaluation(folder, **{"eval.grader": "quarter"})) == 0
    assert printed(capsys)["eval/accuracy"] == 0.25
    assert [answer for _, answer in seen] == [row["answer"] for row in sums()]


def test_greedy_answers_are_the_models_likeliest(tmp_path: Path, folder: Path) -> None:
    assert cli.main(evaluation(folder, output=tmp_path / "a.jsonl")) == 0
    words, model = tokenizer(), AutoModelForCausalLM.from_pretrained(folder / "student")
    for row, answer in zip(sums(), read_jsonl(tmp_path / "a.jsonl"), strict=True):
        prompt = torch.tensor([words(f"<u>{row['prompt']}<a>")["input_ids"]])
        ids = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        assert answer["completion"] == words.decode(ids, skip_special_tokens=True)


def test_sampled_answers_depend_on_the_seed_alone(tmp_path: Path, folder: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli.main(evaluation(folder, output=tmp_path / name, seed=seed, **{"eval.temperature": 1})) == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def scoring(folder: Path, output: Path, **overrides: object) -> list[str]:
    settings: dict[str, object] = {
        "model.path": folder / "student",
        "data.path": folder / "sums.jsonl",
        "output": output,
    }
    return arguments("score", settings | overrides)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"batch.max_tokens": 12}, {"batch.layout": "packed"}, {"data.chat_template": "false"}],
    ids=["default", "temperature", "small-batches", "packed", "plain-text"],
)
def test_scores_are_the_models_log_probs(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object]
) -> None:
    output = tmp_path / "scores.jsonl"
    assert cli.main(scoring(folder, output, **options)) == 0
    assert f"12 rows written to {output}" in capsys.readouterr().out
    words, model = tokenizer(), AutoModelForCausalLM.from_pretrained(folder / "student")
    template = "{}" if "data.chat_template" in options else "<u>{}<a>"
    for line, (row, scored) in enumerate(zip(sums(), read_jsonl(output), strict=True), start=1):
        prompt = words(template.format(row["prompt"]))["input_ids"]
        completion = [*words(row["completion"])["input_ids"], words.eos_token_id]
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1] / float(options.get("temperature", 1.0))  # type: ignore[arg-type]
        wanted = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        assert scored["source"] == f"{folder / 'sums.jsonl'}:{line}"
        assert scored["ids"] == ids[0].tolist()
        assert scored["loss_mask"] == [False] * len(prompt) + [True] * len(completion)
        assert scored["logprobs"] == pytest.approx([0.0] * len(prompt) + wanted.tolist(), abs=1e-4)
        assert scored["sum"] == pytest.approx(wanted.sum().item(), abs=1e-3)


def test_score_refuses_rows_without_a_completion(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "1"}])
    assert cli.main(scoring(folder, tmp_path / "out.jsonl", **{"data.path": data})) == 2
    assert "d.jsonl:1: no `completion`" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "\x1b[2J", "content": "q"}]},
            r"d.jsonl:1: turn 1 of `messages` has the role '\x1b[2J'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "\x1b[2J"}]}]}, r"a part of the type '\x1b[2J'"),
        (
            {"prompt": "q", "tools": [{"name": "f"}]},
            "d.jsonl:1: the row has `tools`, which the chat template does not read",
        ),
    ],
)
def test_a_row_that_cannot_be_asked_is_one_line(
    row: dict[str, object], message: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which a terminal shows as it is: no escape sequence of the data reaches it."""
    data = write_jsonl(tmp_path / "d.jsonl", [row | {"answer": "4"}])
    assert cli.main(evaluation(folder, **{"eval.data.path": data})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.isprintable()


def test_an_answer_in_a_chat_is_no_part_of_the_prompt(tmp_path: Path, folder: Path) -> None:
    """`eval` does not show it to the model, and `score` scores it."""
    chat = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": chat, "answer": "2"}, {"prompt": "1+1=", "completion": "2"}])
    assert cli.main(scoring(folder, tmp_path / "s.jsonl", **{"data.path": data})) == 0
    first, second = read_jsonl(tmp_path / "s.jsonl")
    assert {**first, "source": ""} == {**second, "source": ""}
    data = write_jsonl(tmp_path / "e.jsonl", [{"messages": chat, "answer": "2"}])
    assert cli.main(evaluation(folder, output=tmp_path / "a.jsonl", **{"eval.data.path": data})) == 0
    (answer,) = read_jsonl(tmp_path / "a.jsonl")
    assert answer["prompt"] == chat[:1]
