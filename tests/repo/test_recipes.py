"""Recipes: every config is accepted by its command, and what their scripts make and measure is what they say."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from recipe_cases import RECIPES, Load

from fastkl.trainer.commands.command_line import COMMANDS, parse
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes

CONFIGS = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent.name != "accelerate"]  # its launcher's own


def command_of(settings: dict[str, object]) -> str:
    """What tells the commands' configs from each other."""
    if "sampling" in settings:
        return "sample" if "output" in settings else "distill"
    if "run" in settings:
        return "sft"
    return "score" if "data" in settings else "eval"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_config_is_accepted(path: Path) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    command = command_of(settings)
    name, config = parse([command, str(path)])
    assert name == command
    assert isinstance(config, COMMANDS[command].config)


def test_every_recipe_has_its_own_run_folders() -> None:
    runs = [yaml.safe_load(path.read_text(encoding="utf-8")).get("run") for path in CONFIGS]
    named = [run for run in runs if run is not None]
    assert len(named) == len(set(named))
    assert all(run.startswith("runs/") for run in named)


def test_every_run_of_the_objectives_is_accepted(recipe: Load) -> None:
    measure, series = recipe("objectives", "measure", "series")
    for scale, given in measure.SCALES.items():
        runs = [measure.Run(name, size, 2e-4, 1) for name in measure.OBJECTIVES for size in given.batches]
        assert len({run.folder for run in runs}) == len(runs)
        yaml_file = measure.HERE / f"{scale}.yaml"
        configs = [parse(series.words("distill", yaml_file, measure.settings_of(scale, run)))[1] for run in runs]
        lists = {config.loss.top_k for config in configs if config.loss.objective == "top_k"}
        assert lists == {given.top_k}


def test_a_learning_rate_is_chosen_by_the_seed_that_is_not_shown(
    recipe: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (measure,) = recipe("objectives", "measure")
    monkeypatch.setattr(measure, "RUNS", tmp_path)
    for rate, seed, kl in ((2e-4, 0, 0.5), (6e-4, 0, 0.4), (2e-3, 1, 0.1), (2e-3, 0, 0.6)):
        run = measure.Run("tail", 1000, rate, seed)
        metrics = [{"step": 0, "eval/accuracy": 0.1}, {"step": 1, "teacher_kl": kl, "eval/accuracy": 0.2}]
        folder = tmp_path / "tiny" / run.folder
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(asdict(run) | measure.summary("tiny", metrics)))
    assert measure.best_rate("tiny", "tail", 1000) == 6e-4
    assert {result["accuracy"] for result in measure.results("tiny")} == {0.2}


def test_sorting_problems(recipe: Load) -> None:
    (digits,) = recipe("several", "digits")
    rows = digits.sorting(200)
    assert len({row["prompt"] for row in rows}) == 200
    for row in rows:
        assert row["answer"] == row["completion"] == "".join(sorted(row["prompt"].removesuffix(" =").split()))


def test_likelihood_of_solutions(recipe: Load) -> None:
    (heal,) = recipe("smollm2", "heal")
    scores = [{"sum": -4 * math.log(2), "loss_mask": [0, 1, 1]}, {"sum": -4 * math.log(2), "loss_mask": [0, 0, 1, 1]}]
    assert heal.likelihood(scores, ["ab", "é"]) == pytest.approx({"perplexity": 4.0, "bits_per_byte": 2.0})


def test_held_out_problems_are_other_ones(recipe: Load) -> None:
    (make,) = recipe("smollm2", "make")
    rows = list(make.held_out(set()))
    assert len(rows) == make.HELD_OUT
    again = list(make.held_out({rows[0]["prompt"]}))
    assert len(again) == make.HELD_OUT
    assert rows[0] not in again
    for row in rows:
        assert row["completion"].split()[-1] == row["answer"]


def test_arms_of_the_feedback_recipe(recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")  # as the script sets them: they are restored
    compare, series = recipe("feedback", "compare", "series")
    runs = [(*arm, seed) for arm in compare.ARMS for seed in (0, 1)]
    assert len({compare.folder(*run) for run in runs}) == len(runs)
    configs = [
        parse(series.words("distill", compare.HERE / f"{name}.yaml", compare.settings(control, seed)))[1]
        for name, control, seed in runs
    ]
    assert [config.seed for config in configs] == [seed for *_, seed in runs]
    assert [config.loss.control for config in configs[::2]] == [control for _, control in compare.ARMS]


@pytest.mark.parametrize("name", ["sdpo", "sdpo_sampled", "rlsd"])
def test_the_feedback_recipes_student_was_taught_to_read_what_its_teacher_reads(recipe: Load, name: str) -> None:
    (make,) = recipe("feedback", "make")
    sibling = parse(["distill", str(RECIPES / "feedback" / f"{name}.yaml")])[1].teacher.context.sibling
    solution = sibling.solution.format(text="1 + 1 = 2")
    read = sibling.template.format(prompt="1 + 1 =", solution=solution, feedback="")
    assert read == make.TOLD.format(prompt="1 + 1 =", text="1 + 1 = 2")


def test_every_run_of_the_tokenizers_is_accepted(recipe: Load) -> None:
    compare, make, series = recipe("tokenizers", "compare", "make", "series")
    runs = [(kind, arm, seed) for kind in compare.KINDS for arm in compare.ARMS for seed in (0, 1)]
    assert len({compare.folder(*run) for run in runs}) == len(runs)
    for kind, arm, seed in runs:
        command = compare.command_of(arm)
        settings = compare.settings(kind, arm, seed)
        config = parse(series.words(command, compare.HERE / f"{command}.yaml", settings))[1]
        assert (config.seed, str(config.student.path)) == (seed, f"runs/tokenizers/{kind}/student/student")
        if command == "distill":
            assert config.teacher.tokenizer == (None if arm == "same" else "own")
            assert (kind in Path(config.teacher.path).parts) == (arm == "same")
    known = TokenBytes(make.pairs())
    for solution in ("4 - 1 = 3\n3 - 7 = -4", "1 + 1 = 2"):
        (ids,) = known.encode([solution], [None])
        assert known.join(ids) == solution.encode()
        assert len(ids) == (len(solution) + 1) // 2


def test_agreement_of_two_tokenizers(recipe: Load) -> None:
    segments, make = recipe("tokenizers", "segments", "make")
    one = make.make_tokenizer(["4", " - ", "1", " = ", "3"], r"\d| - | = ")
    found = segments.counted(TokenBytes(one), TokenBytes(make.pairs()), ["4 - 1 = 3"])
    sizes = {"bytes": 9, "segments": 3, "tokens": 5, "teacher_tokens": 5, "alone": 1, "outside": 0, "longest": 4}
    assert found == sizes  # "4 - │1 = │3" and "4 ·- │1 ·= │3"


def test_d_per_byte_of_a_real_pair(recipe: Load, tmp_path: Path) -> None:
    (real,) = recipe("tokenizers", "real")
    alignment = {"alignment/segment_tokens": 1.5, "alignment/segment_bytes": 4.0}
    step = {"step": 1, "teacher_kl": 2.0, **dict.fromkeys(real.OF_STEPS[1:], 0.5), **alignment}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    samples = [
        {"sampler_logprobs": [0.0, -1.0, -2.0, -3.0], "teacher_logprobs": [0.0, *theirs, 0.0], "segments": [0, 1, 1, 0]}
        for theirs in ([-3.0, -4.0], [-5.0, -6.0])
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (found,) = real.steps(tmp_path)
    assert found["d_per_byte"] == 2.0 * 1.5 / 4.0
    # Σd is 4 and 8 of 4 bytes each: 1.5 a byte, and each is off by 2.
    assert real.spread(tmp_path) == {"samples": 2, "segments_per_sample": 1.0, "d_per_byte_error": 0.5}
