"""The subcommands of `fastkl`: what each takes, from a YAML file and the command line, and what it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import transformers
import yaml
from jsonargparse import ArgumentParser

from fastkl.trainer.config.offline import EvaluateConfig, ReportConfig, ScoreConfig
from fastkl.trainer.config.settings import flat, refuse_renamed
from fastkl.trainer.config.training import DistillConfig, SftConfig

DESCRIPTION = (
    "On-policy distillation of language models. A command takes CONFIG.yaml and --key value overrides; report takes run "
    "folders."
)


def _add_settings(parser: ArgumentParser, config: type) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    parser.add_class_arguments(config, None)


def _add_runs(parser: ArgumentParser, config: type) -> None:
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN", help="Run folders.")
    parser.add_argument(
        "--output",
        type=str,
        metavar="FILE",
        help="Write this HTML file; an older report is replaced. By default, report.html in the folder of the one run.",
    )


class Command(NamedTuple):
    """A subcommand: `function` takes the config; it is imported when the command runs."""

    config: type
    function: str  # module:name, within fastkl.trainer
    help: str
    usage: str = "CONFIG.yaml [--key value ...]"
    add_arguments: Callable[[ArgumentParser, type], None] = _add_settings


COMMANDS = {
    "distill": Command(DistillConfig, "distill:distill", "distil a teacher into a student, on the student's samples"),
    "sft": Command(SftConfig, "sft:sft", "fine-tune a student on given completions (the stage before distillation)"),
    "eval": Command(EvaluateConfig, "commands.evaluate:evaluate_model", "let a model answer prompts, and grade it"),
    "score": Command(ScoreConfig, "commands.score:score_completions", "write log-probs of given completions to a file"),
    "report": Command(
        ReportConfig,
        "runs.report.page:report",
        "draw a run, or several on the same axes, as one HTML page",
        usage="RUN [RUN ...] [--output FILE]",
        add_arguments=_add_runs,
    ),
}


def run(argv: list[str]) -> None:
    """Parses a command line and runs its command."""
    name, config = parse(argv)
    transformers.logging.disable_progress_bar()
    module, function = COMMANDS[name].function.split(":")
    getattr(importlib.import_module(f"fastkl.trainer.{module}"), function)(config)


def parse(argv: list[str]) -> tuple[str, Any]:
    """The command's name and its config: the YAML file first, then the overrides."""
    takes_yaml = bool(argv) and argv[0] in COMMANDS and COMMANDS[argv[0]].add_arguments is _add_settings
    if takes_yaml and len(argv) > 1 and not argv[1].startswith("-"):
        argv = [argv[0], "--config", *argv[1:]]
    refuse_renamed(_given(argv), "Write the new names")
    parser = _parser()
    values = parser.instantiate(parser.parse_args(argv))
    name: str = values.command
    settings = vars(values[name])
    settings.pop("config", None)
    return name, COMMANDS[name].config(**settings)


def _given(argv: list[str]) -> Iterator[tuple[str, Any]]:
    """The settings on a command line and in its YAML file. What cannot be read is the parser's to refuse."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = word.removeprefix("--").partition("=")
        text = value if equals else following
        if not word.startswith("--"):
            continue
        try:
            if name != "config":
                yield from flat({name: yaml.safe_load(text)})
            elif isinstance(settings := yaml.safe_load(Path(text).read_text(encoding="utf-8")), dict):
                yield from flat(settings)
        except (yaml.YAMLError, OSError, UnicodeDecodeError):
            continue


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fastkl", description=DESCRIPTION)
    commands = parser.add_subcommands(required=True, dest="command", title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = ArgumentParser(
            description=command.help[0].upper() + command.help[1:] + ".", usage=f"fastkl {name} {command.usage}"
        )
        command.add_arguments(subparser, command.config)
        commands.add_subcommand(name, subparser, help=command.help)
    return parser
