"""What may not be meant is said in one line at the start, and nothing is said of what is usual."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_settings import config
from tiny_data import sums, write_jsonl
from tiny_models import tokenizer

from fastkl.trainer.config.data import DataConfig, EvalConfig
from fastkl.trainer.data.mixture import read_data_sets
from fastkl.trainer.data.prompts import encode_prompts
from fastkl.trainer.data.remarks import remark_on_data_sets, remark_on_length, remark_on_rows
from fastkl.trainer.rollouts.evaluation import load_evaluations


@pytest.mark.parametrize(
    ("rows", "taken", "said"),
    [(12, 12, ""), (12, 13, "a row comes up to 2 times"), (12, 64, "data has 12 rows and a step takes 64 (x): ")],
)
def test_more_rows_than_there_are(rows: int, taken: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    remark_on_rows(rows, taken, "data", "x")
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)


def test_the_rows_of_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each data set has its share of the prompts."""
    files = [write_jsonl(tmp_path / name, sums(count)) for name, count in (("few", 2), ("many", 9))]
    mixture = f"{{few: {{data: {{path: {files[0]}}}}}, many: {{data: {{path: {files[1]}}}, weight: 2}}}}"
    settings = {"run": "r", "student.path": "s", "teacher.path": "t", "mixture": mixture}
    data_sets = read_data_sets(config("distill", settings).data_sets(), tokenizer(), with_given=False)
    remark_on_data_sets(data_sets, 12, "x")
    error = capsys.readouterr().err
    assert "mixture.few.data has 2 rows and a step takes 4 (x)" in error
    assert "many" not in error


@pytest.mark.parametrize("said", [True, False])
def test_a_sample_longer_than_a_forward_pass(said: bool, capsys: pytest.CaptureFixture[str]) -> None:
    remark_on_length(25 if said else 24, 24)
    assert ("batch.max_tokens is 24 and a sample may have 25 tokens" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("grader", "answers", "said"),
    [
        ("last_number", ["7", "1,234", "x = 1.5", "#### 3"], ""),
        ("last_number", ["7", "red", "blue"], "gives 0 even to the answer itself in 2 of 3 rows"),
        ("last_number", ["red"], "d.jsonl:1: 'red'; name another grader"),
        ("boxed", ["7", "red", r"\\boxed{4}"], ""),
        ("regex:(?P<answer>\\d+) is it", ["7", "red"], ""),
    ],
)
def test_answers_that_no_completion_can_match(
    grader: str, answers: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "1", "answer": answer} for answer in answers])
    load_evaluations(EvalConfig(DataConfig(str(data)), grader=grader), tokenizer())
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)


def test_many_prompts_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastkl.trainer.data.rows import Prompt

    rows = [Prompt(f"d:{line}", f"{line}+1=") for line in range(10)]
    whole = encode_prompts(rows, tokenizer(), DataConfig(chat_template=False))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("fastkl.trainer.data.prompts.AT_ONCE", 4)
    assert [*encode_prompts(rows, tokenizer(), DataConfig(chat_template=False))] == [*whole]
    assert "encoded 10/10" in capsys.readouterr().err
