"""SmolLM2 in the reasoning recipe: its task and grader, the runs it makes, and what chooses rate and checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_cases import RECIPES, Load

from bench.tables import half_trained
from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.rollouts.grading.named import named_grader

FOLDER = "reasoning/smollm2"


def test_solutions_are_right_and_mistakes_cost_their_share(recipe: Load) -> None:
    (letters,) = recipe(FOLDER, "letters")
    grader = named_grader("grader", "function:letters.right", trusted=True)
    orders = set()
    for row in letters.rows(20, seed=0):
        prompt, written = Prompt("row", prompt=row["prompt"], answer=row["answer"]), row["completion"]
        assert sorted(row["prompt"].split()) == row["answer"].split()
        parts = written.split(", ")
        orders.add(parts[0][0])
        assert grader(written, prompt) == 1
        assert grader(", ".join(parts[1:]), prompt) == pytest.approx(0.8)
        assert grader(f"{written}, {parts[0]}", prompt) == pytest.approx(0.8)  # said twice
        assert grader(written.replace(parts[0], f"{parts[0]}1"), prompt) == pytest.approx(0.8)
        assert grader("", prompt) == 0
    assert orders == {"a", "e"}
    assert list(letters.rows(5, seed=1)) == list(letters.rows(5, seed=1)) != list(letters.rows(5, seed=2))


def test_arms_see_the_same_prompts_in_batches_of_one_size(recipe: Load) -> None:
    (measure, series) = recipe(FOLDER, "measure", "series")
    half = parse(["sft", str(measure.HERE / "half.yaml")])[1].data.limit
    for name, arm in measure.ARMS.items():
        run = measure.Run(name, 3e-3, 1)
        config = parse(series.words(arm.command, RECIPES / FOLDER / f"{arm.command}.yaml", measure.settings_of(run)))[1]
        assert (config.optim.lr, config.seed, config.data.offset) == (3e-3, 1, half)
        size = config.examples_per_step if name == "sft" else config.sampling.samples_per_step
        assert size == measure.EXAMPLES
        assert config.optim.steps % config.eval.every == 0


def test_validation_at_temperature_1_chooses(recipe: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (measure,) = recipe(FOLDER, "measure")
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    (tmp_path / "writing").mkdir()
    writing = {"flops": 20.0, "completions": 10, "mean_length": 35.0, "truncated_fraction": 0.0}
    (tmp_path / "writing" / "result.json").write_text(json.dumps(writing))
    for rate, values in zip(measure.RATES, ((0.3, 0.2), (0.1, 0.4), (0.2, 0.3)), strict=True):
        run = measure.Run("sft", rate, 0)
        (run.folder / "student").mkdir(parents=True)
        (run.folder / "student" / "config.json").write_text("{}")
        rows = [{"step": step, "flops/student": 5.0, "loss": 1.0} for step in (1, 2)]
        for row, value in zip(rows, values, strict=True):
            row |= {"eval/accuracy": value, "eval/accuracy_t0": 1 - value, "eval/accuracy_se": 0.1} | {
                "eval/accuracy_t0_se": 0.1
            }
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measure.chosen_rate("sft") == measure.RATES[1]
    runs = [row for row in measure.results() if row["arm"] == "sft"]
    assert [run["chosen"] for run in runs if run["rate"] == measure.RATES[1]] == [True]
    assert sum(run["chosen"] for run in runs) == 1
    curve = next(run["curve"] for run in runs if run["chosen"])
    assert [point["flops"] for point in curve] == [5 + 2 * measure.EXAMPLES, 10 + 4 * measure.EXAMPLES]


def test_the_table_reads_the_report() -> None:
    table = half_trained.arms()
    assert all(f"| {label} |" in table for label in (half_trained.BEGINS["half"], *half_trained.ARMS.values()))
