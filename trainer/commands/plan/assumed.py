"""A run that is planned on any machine: its models' config.json are read, and its data where they are here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import yaml
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.commands.plan.growth import Growth, growths, lines_of
from fastkl.trainer.commands.plan.run import Processes, Run, Scorer, scorers_of
from fastkl.trainer.config.mixture import DataSetConfig
from fastkl.trainer.config.offline import DistillPlan, SftPlan
from fastkl.trainer.data.mixture import DataSet, prompt_lengths, read_data_sets, step_prompts
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.errors import ConfigError, brief
from fastkl.trainer.models.loading import outline_of_student
from fastkl.trainer.models.pretrained import load_tokenizer
from fastkl.trainer.sft import step_examples
from fastkl.trainer.teachers.context.prompts import TeacherPrompts

ROWS = 1000  # of each data set: lengths of so many say enough
USUAL_TOKENS = 512  # of a prompt or a given completion of which nothing is known
AS_MANY = "a teacher with teacher.tokenizer own reads as many tokens as the student, for {}"

T = TypeVar("T")


class Planned(NamedTuple):
    """A run, and what was taken for granted of it, in words."""

    run: Run
    assumed: list[str]


def planned(config: DistillPlan | SftPlan) -> Planned:
    """The run of a config.

    Raises:
        ConfigError: Where a model's config.json is missing, naming all of them; where the accelerate file is not one.
    """
    student, scorers = _models(config)
    started = _processes(config)
    lengths, samples, typical, assumed = _step(config)
    return Planned(Run(config, started, student, scorers, lengths, samples, typical), assumed)


def _models(config: DistillPlan | SftPlan) -> tuple[Any, list[Scorer]]:
    missing: list[str] = []

    def read(name: str, function: Callable[[], T]) -> T | None:
        try:
            return function()
        except ConfigError as error:
            missing.append(f"{name}: {error}")
            return None

    student = read("student", lambda: outline_of_student(config.student))
    scorers = None
    if isinstance(config, DistillPlan):
        scorers = read("teacher or reference", lambda: list(scorers_of(config, student)))
    if missing:
        raise ConfigError(
            f"{'; '.join(missing)}. A plan needs no weights: put the model's config.json into a folder, and give that: "
            f"--student.path FOLDER, --teacher.path FOLDER"
        )
    return student, scorers or []


def _processes(config: DistillPlan | SftPlan) -> Processes:
    if config.accelerate is None:
        return Processes(config.processes or 1, False, config.device)
    found = _accelerate(config.accelerate)
    kind, fsdp = found.get("distributed_type", "NO"), found.get("fsdp_config") or {}
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP") or (kind == "FSDP" and fsdp.get("fsdp_version") != 2):
        raise ConfigError(
            f"accelerate is {config.accelerate!r} with distributed_type {kind}; this trainer knows DDP and FSDP 2: take "
            f"recipes/accelerate/ddp.yaml or fsdp2.yaml"
        )
    return Processes(config.processes or int(found.get("num_processes", 1)), kind == "FSDP", config.device)


def _accelerate(name: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"accelerate is {name!r}, which cannot be read: {brief(error)}; name a file of accelerate"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"accelerate is {name!r}, which holds no settings; name a file of accelerate")
    return found


def _step(config: DistillPlan | SftPlan) -> tuple[list[int], list[Sample], list[Sample], list[str]]:
    """Lengths of prompts, the samples of a step at their longest and as they are expected, and what was assumed."""
    entries: dict[str, DataSetConfig] = {**config.data_sets()}
    given = isinstance(config, SftPlan)
    try:
        few = {name: replace(entry, data=replace(entry.data, limit=_least(entry))) for name, entry in entries.items()}
        tokenizer = load_tokenizer(config.student)
        data_sets = read_data_sets(few, tokenizer, with_given=given)
    except (ConfigError, OSError, ImportError) as error:
        return _unread(config, entries, brief(error))
    lengths = prompt_lengths(data_sets).tolist()
    if isinstance(config, SftPlan):
        chosen = step_examples(data_sets, config, 0)
        return lengths, chosen, chosen, []
    prompts = step_prompts(data_sets, config.sampling.prompts_per_step, 0, config.seed)
    grown, said = _grown(config, data_sets, tokenizer)
    rows = [(len(prompt.tokens), prompt.dataset) for prompt in prompts]
    return lengths, *_sampled(config, rows, grown), [*_mean(config), *said]


def _grown(
    config: DistillPlan, data_sets: list[DataSet], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Growth], list[str]]:
    """How much more teachers with their own tokenizers read."""
    if not _own(config):
        return {}, []
    try:
        grown = growths(data_sets, TeacherPrompts(config, data_sets, tokenizer), tokenizer)
    except (ConfigError, OSError, ImportError) as error:
        return {}, [AS_MANY.format(f"its tokenizer could not be read ({brief(error)})")]
    return grown, [*lines_of(grown)]


def _own(config: DistillPlan) -> bool:
    return any(teacher.own_tokenizer for teacher in config.teachers().values())


def _unread(
    config: DistillPlan | SftPlan, entries: Mapping[str, DataSetConfig], why: str
) -> tuple[list[int], list[Sample], list[Sample], list[str]]:
    """Where tokenizer or data are not here: all prompts of one length."""
    longest = [entry.data.max_prompt_tokens or USUAL_TOKENS for entry in entries.values()]
    tokens = config.prompt_tokens or max(longest)
    said = [f"prompts of {tokens:,} tokens each, for the data could not be read ({why})"]
    names = list(entries)
    if isinstance(config, SftPlan):
        made = _maker()(tokens, config.mean_tokens or USUAL_TOKENS, names[0])
        examples = [made] * config.examples_per_step
        return [tokens], examples, examples, [*said, f"completions of {made.loss_tokens:,} tokens each"]
    rows = [(tokens, names[place % len(names)]) for place in range(config.sampling.prompts_per_step)]
    said += [AS_MANY.format("there are no texts to compare")] if _own(config) else []
    return [tokens], *_sampled(config, rows, {}), [*said, *_mean(config)]


def _sampled(
    config: DistillPlan, rows: list[tuple[int, str]], grown: Mapping[str, Growth]
) -> tuple[list[Sample], list[Sample]]:
    """Samples of full length, and as they are expected; those of one length are one object, which nothing writes into."""
    make, each, most = _maker(grown), config.sampling.samples_per_prompt, config.sampling.max_new_tokens
    mean = min(config.mean_tokens or most, most)
    full, typical = ([make(tokens, new, name) for tokens, name in rows for _ in range(each)] for new in (most, mean))
    return full, typical


def _maker(grown: Mapping[str, Growth] = MappingProxyType({})) -> Callable[[int, int, str], Sample]:
    @cache
    def make(prompt: int, new: int, data_set: str) -> Sample:
        sample = make_sample([0] * prompt, [0] * new, 0, dataset=data_set)
        if data_set in grown:
            grown[data_set].write(sample)
        return sample

    return make


def _mean(config: DistillPlan) -> list[str]:
    if config.mean_tokens is None:
        return ["completions of full length, which most are not (--mean_tokens)"]
    return [f"completions of {config.mean_tokens:,} tokens on average; memory is that of full length"]


def _least(entry: DataSetConfig) -> int:
    return min(entry.data.limit or ROWS, ROWS)
