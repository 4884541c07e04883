"""Evaluations of several sets, temperatures and answers: which metrics, of which answers, by which random numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_settings import arguments, config
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import save_model, tokenizer

from fastkl import cli
from fastkl.trainer.config.data import EvalConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.models.pretrained import load_model
from fastkl.trainer.models.sizes.flops import Cost, cost_of, sampling_flops
from fastkl.trainer.rollouts.evaluation import Evaluation, evaluate, load_evaluations
from fastkl.trainer.rollouts.single_turn import Trajectory

WORDS = tokenizer()
FREE = Cost(0, 0, 0, 0, 0, (), False)
Call = tuple[int, float, int]  # prompts, temperature, seed


class Half:
    """Answers every second request rightly, and cuts the others short."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def my_share(self, items: Sequence[Any]) -> list[Any]:
        return list(items)

    def respond(
        self, prompts: Sequence[EncodedPrompt], *, max_new_tokens: list[int], temperature: float, seed: int, **_: Any
    ) -> list[Trajectory]:
        self.calls.append((len(prompts), temperature, seed))
        found = []
        for place, prompt in enumerate(prompts):
            right = place % 2 == 0
            ids = WORDS(str(prompt.row.answer) if right else "")["input_ids"] + [WORDS.eos_token_id]
            found.append(Trajectory(ids, [True] * len(ids), [0.0] * len(ids), not right, ids))
        return found


def load(folder: Path, **settings: object) -> list[Evaluation]:
    write_jsonl(folder / "sums.jsonl", sums(4))
    write_jsonl(folder / "long.jsonl", sums(3))
    more = {"more": {"long": {"data": {"path": str(folder / "long.jsonl")}, "max_new_tokens": 3}}}
    given = {"data.path": folder / "sums.jsonl", **settings}
    named = {f"eval.{name}": json.dumps(value) if isinstance(value, dict) else value for name, value in given.items()}
    found: EvalConfig = config("eval", {"model.path": "m", **named, "eval.more": json.dumps(more["more"])}).eval
    return load_evaluations(found, WORDS)


def test_each_set_is_answered_at_each_temperature(tmp_path: Path) -> None:
    half = Half()
    evaluations = load(tmp_path, temperature=[0, 0.5], samples_per_prompt=2)
    metrics = evaluate(evaluations, half, WORDS, FREE, 7, 3)
    assert [call[:2] for call in half.calls] == [(4, 0), (8, 0.5), (3, 0), (6, 0.5)]
    assert {name: value for name, value in metrics.items() if "accuracy" in name or "pass" in name} == pytest.approx(
        {
            "eval/accuracy": 0.5,
            "eval/accuracy_se": math.sqrt(4 * 0.25 / 3 / 4),
            "eval/accuracy_t0.5": 0.5,  # one right and one wrong answer to each prompt: sure of the mean, and of pass@2
            "eval/accuracy_t0.5_se": 0,
            "eval/pass_at_2_t0.5": 1,
            "eval/pass_at_2_t0.5_se": 0,
            "eval/long/accuracy": 2 / 3,
            "eval/long/accuracy_se": 1 / 3,
            "eval/long/accuracy_t0.5": 0.5,
            "eval/long/accuracy_t0.5_se": 0,
            "eval/long/pass_at_2_t0.5": 1,
            "eval/long/pass_at_2_t0.5_se": 0,
        }
    )
    assert metrics["eval/truncated_fraction_t0.5"] == 0.5
    assert [one.ask.max_new_tokens for one in evaluations] == [256, 256, 3, 3]


def test_a_step_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    """Whatever was evaluated before it: a resumed run evaluates as the run that was never interrupted."""
    evaluations, seeds = load(tmp_path, temperature=1), dict[tuple[int, int], set[int]]()
    for seed, step in [(0, 0), (0, 1), (1, 0), (0, 1)]:
        half = Half()
        evaluate(evaluations, half, WORDS, FREE, seed, step)
        seeds.setdefault((seed, step), set()).update(call[2] for call in half.calls)
    assert [len(found) for found in seeds.values()] == [1, 1, 1]
    assert len(set.union(*seeds.values())) == 3


def test_a_grader_of_a_sets_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with it is said with its own name."""
    data = write_jsonl(tmp_path / "d.jsonl", sums(2))
    given = {"model.path": tmp_path, "eval.data.path": data}
    for more, said in (
        ('{x: {data: {path: d.jsonl}, grader: "nosuch"}}', "eval.more.x.grader is 'nosuch'"),
        ('{x: {data: {path: d.jsonl}, grader: "function:a.b"}}', "eval.more.x.trust_grader"),
    ):
        save_model(tmp_path)
        assert cli.main(arguments("eval", given | {"eval.more": more.replace("d.jsonl", str(data))})) == 2
        assert said in capsys.readouterr().err


def test_a_file_of_all_answers(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says which answers they are; its FLOPs are those of the samples; ended anywhere, the same command goes on."""
    output = tmp_path / "answers.jsonl"
    more = json.dumps({"few": {"data": {"path": str(folder / "sums.jsonl"), "offset": 10}}})
    settings = {"model.path": folder / "student", "eval.data.path": folder / "sums.jsonl", "eval.more": more}
    settings |= {"eval.max_new_tokens": 4, "eval.temperature": [1, 0], "eval.samples_per_prompt": 3, "output": output}
    command = arguments("eval", settings)
    assert cli.main(command) == 0
    printed, whole = capsys.readouterr().out, output.read_bytes()
    rows = read_jsonl(output)
    named = [(row["set"], row["temperature"], row["sample"]) for row in rows]
    assert named == [
        (of, temperature, sample)
        for of, prompts in (("", 12), ("few", 2))
        for temperature, samples in ((1, 3), (0, 1))
        for _ in range(prompts)
        for sample in range(samples)
    ]
    model = load_model(config("eval", settings).model)
    evaluations = load_evaluations(config("eval", settings).eval, tokenizer())
    lengths = [len(prompt.tokens) for one in evaluations for prompt in one.ask.each]
    made = [Written(length, row["tokens"]) for length, row in zip(lengths, rows, strict=True)]
    assert json.loads(printed)["eval/flops"] == sampling_flops(cost_of(model), made)  # type: ignore[arg-type]
    for kept in (5, 38, 50):
        output.write_bytes(b"\n".join(whole.split(b"\n")[:kept]) + b'\n{"torn')
        assert cli.main(command) == 0
        assert capsys.readouterr().out == printed
        assert output.read_bytes() == whole


class Written:
    """What the count reads of a sample."""

    def __init__(self, prompt: int, tokens: int) -> None:
        self.prompt_length, self.ids, self.loss_tokens = prompt, range(prompt + tokens), tokens
