"""Settings and the command line: what is refused, in which words, with nothing left behind."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
from run_cases import check_refused, refusal, refusals
from run_settings import MINIMAL, URL, arguments, config
from tiny_data import sums, write_jsonl
from tiny_models import save_model, tokenizer

from fastkl import cli
from fastkl.trainer.commands.command_line import COMMANDS, Command
from fastkl.trainer.commands.schema import group_of, settings_of
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.losses.weights import FORMS
from fastkl.trainer.config.mixture import DataSetConfig, TaughtConfig
from fastkl.trainer.config.training import DistillConfig, SftConfig
from fastkl.trainer.errors import ConfigError

SAMPLED: dict[str, object] = {"sampling.server.url": URL, "sampling.server.model": "m"}
SERVED: dict[str, object] = {
    "model.path": "",
    "model.server.url": URL,
    "model.server.model": "m",
    "model.tokenizer": "t",
}
# settings, what the message must hold: the setting with its value, and the way out
REFUSED: dict[str, list[tuple[dict[str, object], list[str]]]] = {
    "distill": [
        ({"run": ""}, ["run is empty", "runs/first"]),
        ({"student.path": ""}, ["student.path is empty", "model folder or a Hub id"]),
        (
            {"sampling.dtype": "bfloat16", "student.dtype": "bfloat16"},
            ["sampling.dtype is bfloat16", "student.dtype", "unset sampling.dtype"],
        ),
        (SAMPLED | {"sampling.dtype": "bfloat16"}, ["sampling.dtype is 'bfloat16'", URL, "--dtype", "unset it"]),
        (SAMPLED | {"sampling.max_requests": 4}, ["sampling.max_requests is 4", URL, "--max-num-seqs", "unset it"]),
        (SAMPLED | {"sampling.engine": "generate"}, ["sampling.engine is 'generate'", URL, "unset it"]),
        (
            {"sampling.engine": "generate", "sampling.max_batch_tokens": 64},
            ["sampling.max_batch_tokens is 64", "sampling.engine is generate", "unset it", "sampling.max_requests"],
        ),
        (SAMPLED | {"sampling.server.url": ""}, ["server.model is 'm'", "server.url is empty"]),
        (SAMPLED | {"sampling.server.concurrency": 0}, ["server.concurrency is 0", "at least 1"]),
        ({"data.dataset": "x"}, ["data.path is 'd.jsonl'", "data.dataset is 'x'", "exactly one"]),
        ({"data.path": "null"}, ["data.path is None", "data.dataset is None", "exactly one"]),
        ({"data.limit": 0}, ["data.limit is 0", "at least 1", "null"]),
        ({"eval.temperature": "[]"}, ["eval.temperature is []", "a number, or a list"]),
        ({"eval.temperature": "[0, 1, 1.0]"}, ["eval.temperature is [0.0, 1.0, 1.0]", "one twice"]),
        ({"eval.temperature": "[-1]"}, ["eval.temperature is [-1.0]", "at least 0"]),
        ({"eval.samples_per_prompt": 4}, ["eval.samples_per_prompt is 4", "eval.temperature is 0.0", "greedy"]),
        ({"eval.samples_per_prompt": 0}, ["eval.samples_per_prompt is 0", "at least 1"]),
        ({"eval.more": "{long: {data: {path: x}}}"}, ["eval.more has long", "eval.data names no prompts"]),
        (
            {"eval.data.limit": 5, "eval.more": "{long: {data: {path: x}}}"},
            ["eval.more has long", "eval.data names no prompts"],
        ),
        ({"eval.more": "{a/b: {data: {path: x}}}"}, ["eval.more has a data set 'a/b'", "letters"]),
        (
            {"eval.data.path": "d", "eval.more": "{long: {data: {path: x}, trust_grader: true}}"},
            ["eval.more.trust_grader is True", "no grader of its own"],
        ),
        ({"eval.more": "{long: {grader: boxed}}"}, ["eval.more.long.data.path is None", "exactly one"]),
        ({"data.offset": -1}, ["data.offset is -1", "at least 0"]),
        ({"data.max_prompt_tokens": 0}, ["data.max_prompt_tokens is 0", "at least 1", "null"]),
        ({"log_samples": -1}, ["log_samples is -1", "at least 0"]),
        ({"student.lora.rank": -4}, ["lora.rank is -4", "at least 0"]),
        ({"sampling.prompts_per_step": 0}, ["sampling.prompts_per_step is 0", "at least 1"]),
        ({"sampling.samples_per_prompt": 0}, ["sampling.samples_per_prompt is 0", "at least 1"]),
        ({"sampling.max_new_tokens": 0}, ["sampling.max_new_tokens is 0", "at least 1"]),
        ({"sampling.max_batch_tokens": 0}, ["sampling.max_batch_tokens is 0", "at least 1"]),
        ({"sampling.max_requests": 0}, ["sampling.max_requests is 0", "at least 1"]),
        ({"sampling.temperature": 0}, ["sampling.temperature is 0", "> 0"]),
        ({"sampling.top_p": 0.9}, ["sampling.top_p is 0.9", "importance ratio", "Leave top_p = 1"]),
        ({"sampling.top_k": 50}, ["sampling.top_k is 50", "importance ratio", "top_k = 0"]),
        ({"student.lora.alpha": 16.0}, ["student.lora.alpha is 16.0", "set student.lora.rank"]),
        ({"optim.lr": -1}, ["optim.lr is -1", "at least 0"]),
        ({"optim.steps": 0}, ["optim.steps is 0", "at least 1"]),
        ({"optim.substeps": 0}, ["optim.substeps is 0", "at least 1"]),
        ({"optim.substeps": 65}, ["optim.substeps is 65", "64 samples", "sampling.prompts_per_step"]),
        ({"optim.betas": [0.9]}, ["optim.betas is [0.9]", "two numbers"]),
        ({"optim.betas": [0.9, 1.0]}, ["optim.betas is [0.9, 1.0]", "below 1"]),
        ({"optim.weight_decay": -1}, ["optim.weight_decay is -1", "at least 0"]),
        ({"optim.max_grad_norm": 0}, ["optim.max_grad_norm is 0", "> 0", "null"]),
        ({"optim.warmup_steps": 200}, ["optim.warmup_steps is 200", "optim.steps (100)"]),
        ({"optim.warmup_steps": -1}, ["optim.warmup_steps is -1", "between 0"]),
        ({"batch.max_tokens": 0}, ["batch.max_tokens is 0", "at least 1"]),
        ({"checkpoint.every": -1}, ["checkpoint.every is -1", "at least 0"]),
        ({"checkpoint.keep": 0}, ["checkpoint.keep is 0", "at least 1"]),
        ({"eval.every": -1}, ["eval.every is -1", "at least 0"]),
    ],
    "probe": [
        ({"prompts": 0}, ["prompts is 0", "at least 1"]),
        ({"top": 0}, ["top is 0", "at least 1"]),
        ({"output": " "}, ["output is empty", "JSON file"]),
        (
            {"teacher.path": "", "loss.kl_coef": 0, "reward.grader": "last_number", "reward.baseline": "none"},
            ["no teacher", "teacher.path", "fastkl eval"],
        ),
    ],
    "sample": [
        ({"model.path": ""}, ["model.path is empty", "model.server.url"]),
        ({"model.server.url": URL, "model.server.model": "m"}, ["model.path is 'm'", URL, "give one"]),
        ({"model.tokenizer": "t"}, ["model.tokenizer is 't'", "model.server.url is ''"]),
        (
            {"model.path": "", "model.server.url": URL, "model.server.model": "m"},
            ["model.tokenizer is None", URL, "folder or a Hub id"],
        ),
        (SERVED | {"model.dtype": "bfloat16"}, ["model.dtype is 'bfloat16'", URL, "the server decides"]),
        (SERVED | {"sampling.max_requests": 4}, ["sampling.max_requests is 4", URL, "--max-num-seqs"]),
        ({"output": ""}, ["output is empty", "JSONL"]),
        ({"keep.path": "./o.jsonl"}, ["keep.path is './o.jsonl'", "output"]),
        ({"keep.min_score": 1}, ["keep.min_score is 1.0", "keep.path is null"]),
        ({"keep.path": "k", "keep.min_score": 1}, ["keep.min_score is 1.0", "grader is null"]),
        ({"keep.path": "k", "keep.per_prompt": 0}, ["keep.per_prompt is 0", "at least 1"]),
        ({"trust_grader": "true"}, ["trust_grader is True", "grader is null"]),
        ({"sampling.temperature": -1}, ["sampling.temperature is -1", "at least 0"]),
        (
            {"sampling.temperature": 0, "sampling.samples_per_prompt": 2},
            ["sampling.samples_per_prompt is 2", "sampling.temperature is 0", "greedy"],
        ),
        ({"data.path": "null"}, ["data.path is None", "exactly one"]),
    ],
    "score": [
        ({"model.path": "", "model.server.url": URL, "model.server.model": "m"}, ["model.tokenizer is None", URL]),
        ({"model.self": "base", "model.path": ""}, ["model.self is base", "model.path"]),
        ({"model.path": ""}, ["model.path is empty", "model folder or a Hub id"]),
        ({"output": ""}, ["output is empty", "JSONL"]),
        ({"temperature": 0}, ["temperature is 0", "> 0"]),
        ({"data.dataset": "x"}, ["data.path is 'd.jsonl'", "exactly one"]),
    ],
    "sft": [
        ({"optim.substeps": 5, "examples_per_step": 4}, ["examples_per_step is 4", "optim.substeps (5)"]),
    ],
    "eval": [
        ({"eval.max_new_tokens": 0}, ["eval.max_new_tokens is 0", "at least 1"]),
        ({"eval.temperature": -1}, ["eval.temperature is -1", "at least 0"]),
        ({"model.path": ""}, ["model.path is empty", "model folder or a Hub id"]),
        ({"eval.data.path": "null"}, ["eval.data.path is None", "eval.data.dataset is None", "exactly one"]),
    ],
}


@pytest.mark.parametrize(
    ("command", "settings", "parts"), [case for command, cases in REFUSED.items() for case in refusals(command, cases)]
)
def test_refused_settings(
    command: str, settings: dict[str, object], parts: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(capsys, empty_folder, command, settings, *parts)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config("sft", MINIMAL["sft"]).seed = 1


# Of the tiny models, whose context is 64.
SHORT: dict[str, dict[str, object]] = {"distill": {"sampling.max_new_tokens": 16}}


# What shows only once files are read: still one line, status 2, and nothing on disk.
@pytest.mark.parametrize(
    ("command", "settings", "parts"),
    [
        ("distill", {"student.path": "nosuch"}, ["nosuch", "neither a folder here nor on the Hub"]),
        ("distill", {"student.path": "./nosuch"}, ["./nosuch", "no config.json"]),
        ("distill", {"teacher.path": "data"}, ["'data'", "no config.json"]),
        ("distill", {"student.path": "run"}, ["'run' is a run's folder", "its trained model is run/student"]),
        ("distill", {"data.path": "nosuch.jsonl"}, ["nosuch.jsonl does not exist"]),
        ("distill", {"eval.data.path": "d.jsonl", "eval.grader": "vibes"}, ["eval.grader is 'vibes'", "last_number"]),
        ("distill", {"student.liger": "true"}, ["liger is true", "CUDA", "set it to false"]),
        ("distill", {"sampling.max_new_tokens": 100}, ["context of 64", "max_new_tokens"]),
        ("sft", {"data.path": "nosuch.jsonl"}, ["nosuch.jsonl does not exist"]),
        ("eval", {"model.path": "./nosuch"}, ["./nosuch", "no config.json"]),
        ("eval", {"output": "d.jsonl"}, ["output d.jsonl exists already", "another name"]),
        ("sample", {"output": "d.jsonl"}, ["output d.jsonl exists already", "another name"]),
        ("sample", {"grader": "vibes"}, ["grader is 'vibes'", "last_number"]),
        ("sample", {"keep.path": "d.jsonl"}, ["keep.path d.jsonl exists already", "another name"]),
        ("sample", {"sampling.max_new_tokens": 100}, ["context of 64", "sampling.max_new_tokens"]),
        ("probe", {"output": "d.jsonl"}, ["output d.jsonl exists already", "another name"]),
        ("probe", {"student.path": "./nosuch"}, ["./nosuch", "no config.json"]),
        ("score", {"output": "d.jsonl"}, ["output d.jsonl exists already", "another name"]),
        ("score", {"output": "out/o.jsonl", "model.path": "./nosuch"}, ["./nosuch", "no config.json"]),
    ],
    ids=str,
)
def test_refused_once_files_are_read(
    command: str, settings: dict[str, object], parts: list[str], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(empty_folder / "model")
    write_jsonl(empty_folder / "d.jsonl", sums(3))
    (empty_folder / "data").mkdir()
    (empty_folder / "run").mkdir()
    (empty_folder / "run" / "config.yaml").touch()
    paths = {key: "model" for key in MINIMAL[command] if key.endswith(("student.path", "teacher.path", "model.path"))}
    before = sorted(empty_folder.rglob("*"))
    refusal(capsys, command, MINIMAL[command] | paths | SHORT.get(command, {}) | settings, *parts)
    assert sorted(empty_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("distill", {"sampling.max_new_tokens": 100}),
        ("distill", {"eval.data.path": "d.jsonl", "eval.max_new_tokens": 100}),
        ("distill", {"teacher.path": "short"}),
        ("sft", {"eval.data.path": "d.jsonl", "eval.max_new_tokens": 100}),
    ],
    ids=str,
)
def test_lengths_are_checked_before_a_model_is_loaded(
    command: str, settings: dict[str, object], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(empty_folder / "model")
    save_model(empty_folder / "short", max_position_embeddings=16)
    write_jsonl(empty_folder / "d.jsonl", sums(3))
    paths = {key: "model" for key in MINIMAL[command] if key.endswith(("student.path", "teacher.path"))}
    assert cli.main(arguments(command, MINIMAL[command] | paths | SHORT.get(command, {}) | settings)) == 2
    said = capsys.readouterr().err
    assert "'s context of " in said
    assert "loading the" not in said


def test_home_folder_in_a_path(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands the `~` of a YAML file."""
    from fastkl.trainer.models.pretrained import load_model, load_tokenizer

    save_model(empty_folder / "model")
    monkeypatch.setenv("HOME", str(empty_folder))
    student = config("sft", MINIMAL["sft"] | {"student.path": "~/model"}).student
    assert load_tokenizer(student).get_vocab() == tokenizer().get_vocab()
    assert load_model(student).config.hidden_size == 16


def test_all_configs_are_covered_here() -> None:
    assert {*MINIMAL, "init", "plan", "report"} == COMMANDS.keys()
    assert isinstance(config("sft", MINIMAL["sft"]), SftConfig)
    with pytest.raises(ConfigError):
        config("sft", MINIMAL["sft"] | {"optim.steps": 0})


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_run_a_function_of_their_config(command: Command) -> None:
    module, name = command.function.split(":")
    function = getattr(importlib.import_module(f"fastkl.trainer.{module}"), name)
    first = next(iter(inspect.signature(function, eval_str=True).parameters.values()))
    assert first.annotation == (command.config if command.other is None else command.config | command.other)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_is_a_few_short_sentences(command: Command) -> None:
    entry = {DistillConfig: TaughtConfig, SftConfig: DataSetConfig}.get(command.config)
    for kind in filter(None, (command.config, entry)):
        for name, text in explanations(kind).items():
            assert text[0].isupper(), f"{name}: {text}"
            assert text.endswith("."), f"{name}: {text}"
            assert text.count(". ") <= 3, f"{name}: {text}"


def test_help_names_every_rule_of_weights() -> None:
    said = explanations(LossConfig)["weights"]
    assert [form for form in FORMS if form not in said] == []


def explanations(kind: type) -> dict[str, str]:
    """The `Args:` of a config and of those within it, by name."""
    found: dict[str, str] = {}
    for name, setting in settings_of(kind).items():
        found[name] = setting.help
        group = group_of(setting.kind)
        found |= {} if group is None else {f"{name}.{inner}": text for inner, text in explanations(group).items()}
    return found
