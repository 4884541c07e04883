"""The reasoning recipe: what its teachers write, which runs it makes, how a run is chosen, and what its table counts."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from recipe_cases import RECIPES, Load

from bench.tables import reasoning
from fastkl.trainer.commands.command_line import parse


def test_solutions_in_several_styles_are_right(recipe: Load) -> None:
    pytest.importorskip("reasoning_gym")
    (sums,) = recipe("reasoning", "sums")
    rng = random.Random(0)
    found = set()
    for first, second, third in itertools.product((0, 3, 9), repeat=3):
        for signs in itertools.product("+-", repeat=2):
            expression = f"{first} {signs[0]} {second} {signs[1]} {third}"
            lines = sums.styled(f"{sums.INSTRUCTION} {expression} =", rng).split("\n")
            found |= {len(line.split()) for line in lines}
            assert len(lines) == 2
            assert lines[1].endswith(f" = {eval(expression)}")
            for line in lines:
                left, right = line.split(" = ")
                assert eval(left) == eval(right), line
    assert found == {5, 9}  # a line of two numbers, or one with the rest carried along


def test_every_run_is_accepted_and_has_a_folder_of_its_own(recipe: Load) -> None:
    arms, series = recipe("reasoning", "arms", "series")
    runs = [
        arms.Run(setting, arm, prompts, rate, seed)
        for setting in arms.SETTINGS
        for arm in arms.ARMS
        for prompts in arms.amounts(setting, arm)
        for rate in arms.rates(setting, arm, prompts)
        for seed in (0, 1)
    ]
    runs += [arms.Run("Z", name, 100, 5e-4, 0) for name in arms.VARIANTS]
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        arm = arms.ARMS.get(run.arm, arms.ARMS["sampled"])
        config = parse(series.words(arm.command, RECIPES / "reasoning" / f"{arm.config}.yaml", arms.settings_of(run)))[
            1
        ]
        assert (config.data.limit, config.optim.lr, config.seed) == (run.prompts, run.rate, run.seed)
        assert config.optim.steps % config.checkpoint.every == 0
        assert config.optim.steps // config.checkpoint.every == arms.POINTS <= config.checkpoint.keep
        if arm.command == "distill":
            assert config.sampling.samples_per_step == 64 or run.arm.startswith("batch")


def test_validation_chooses_rate_and_checkpoint(recipe: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    arms, measure = recipe("reasoning", "arms", "measure")
    monkeypatch.setattr(arms, "RUNS", tmp_path)
    monkeypatch.setattr(measure, "RUNS", tmp_path)
    for rate, accuracies in zip(arms.rates("Z", "rl", 100), (0.3, 0.5, 0.4), strict=True):
        run = arms.Run("Z", "rl", 100, rate, 0)
        points = [{"step": 10, "greedy": accuracies, "sampled": 0.2}, {"step": 20, "greedy": 0.2, "sampled": 0.2}]
        points.insert(1, {"step": 13, "greedy": 1.0, "sampled": 1.0})  # where the run was interrupted
        folder = run.folder / "validation"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({**asdict(run), "curve": points}))
        metrics = [{"step": step, "flops/student": 2.0, "entropy": 1.0} for step in range(1, 21)]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    assert measure.chosen_rate("Z", "rl", 100) == arms.rates("Z", "rl", 100)[1]
    for run in measure.results():
        assert (run["best"], run["flops"], run["chosen"], run["first"]) == (0, [20.0, 40.0], False, {"entropy": 1.0})


@pytest.mark.parametrize(("accuracy", "flops"), [(0.1, 0.0), (0.2, 5.0), (0.3, 10.0), (0.5, 30.0), (0.6, None)])
def test_flops_until_an_accuracy(accuracy: float, flops: float | None) -> None:
    curve = [(0.0, 0.1), (10.0, 0.3), (20.0, 0.2), (30.0, 0.5)]
    found = reasoning.flops_to(curve, accuracy)
    assert found == (None if flops is None else pytest.approx(flops))


@pytest.mark.slow
def test_the_script_from_nothing_to_the_tables(recipe: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one setting, with two seeds, on few problems and with two steps a run; then again, where all is there."""
    pytest.importorskip("reasoning_gym")
    arms, sums, series, measure = recipe("reasoning", "arms", "sums", "series", "measure")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["measure.py", "K", "--seeds", "0", "1"])
    problems = sums.problems()[:100]
    monkeypatch.setattr(sums, "problems", lambda: problems)
    monkeypatch.setattr(sums, "HELD_OUT", 40)
    monkeypatch.setattr(sums, "VALIDATION", 20)
    monkeypatch.setattr(arms, "ALL", 40)
    monkeypatch.setitem(arms.SETTINGS, "K", replace(arms.SETTINGS["K"], few=16, more=(24, 40)))
    short = {"optim.steps": 2, "optim.warmup_steps": 1, "checkpoint.every": 2}
    monkeypatch.setattr(measure, "rates", lambda *_: (1e-3, 3e-3))
    monkeypatch.setattr(measure, "POINTS", 1)
    ran = list[Path]()

    def run_here(command: str, config: Path, run: Path, settings: dict[str, object]) -> None:
        ran.append(run)
        series.run_here(command, config, run, settings | short)

    monkeypatch.setattr(measure, "run_here", run_here)
    measure.main()
    report = json.loads((tmp_path / "runs/reasoning/results.json").read_text())
    shown = [run for run in report["runs"] if run.get("chosen")]
    assert {run["arm"] for run in shown} == {*arms.ARMS, *arms.CONTROLS}
    assert all(run["steps"] == [2] for run in shown)
    assert {run["seed"] for run in shown} == {0, 1}
    assert (tmp_path / "runs/reasoning/K.png").is_file()
    monkeypatch.setattr(reasoning, "read_recipe", lambda _: report)
    for name, table in reasoning.TABLES.items():
        assert "| K |" in table() or name == "reasoning-rates"
    ran.clear()
    measure.main()  # models and first stages are asked for again, and found
    assert {path.name for path in ran} == {"plain", "start-0", "start-1"}
