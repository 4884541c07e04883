"""The subcommands of `fastkl`: what each takes, from a YAML file and the command line, and what it runs.

Nothing here imports torch: help, completion and refusals are there at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastkl import __version__
from fastkl.trainer.commands.given import Place, Settings, expanded
from fastkl.trainer.commands.help_page import add_config_file, add_settings
from fastkl.trainer.commands.run_folder import note_of_student, settings_of_run
from fastkl.trainer.commands.schema import full_names, settings_of
from fastkl.trainer.commands.values import node_of
from fastkl.trainer.commands.yaml_file import read_file
from fastkl.trainer.config.offline import (
    DistillPlan,
    EvaluateConfig,
    InitConfig,
    ProbeConfig,
    ReportConfig,
    SampleConfig,
    ScoreConfig,
    SftPlan,
)
from fastkl.trainer.config.training import DistillConfig, SftConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.settings import flat, refuse_renamed

DESCRIPTION = "On-policy distillation of language models: a teacher scores what the student writes."
EXAMPLE = """\
a first run:
  fastkl init STUDENT TEACHER prompts.jsonl > run.yaml
  fastkl distill run.yaml
  fastkl eval runs/first --eval.data.path heldout.jsonl

Any setting of CONFIG.yaml can be given as --name value too; `fastkl COMMAND --help` lists them."""

DRY_RUN = "--dry-run"
DRY_RUN_HELP = (
    "Check everything and estimate a step's FLOPs and memory (docs/speed/accounting.md). Nothing is loaded or written."
)


def _add_settings(parser: argparse.ArgumentParser, config: type) -> None:
    add_config_file(parser)
    add_settings(parser, config)


def _add_runs(parser: argparse.ArgumentParser, config: type) -> None:
    helps = settings_of(config)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=helps["runs"].help)
    parser.add_argument("--output", metavar="FILE", help=helps["output"].help)


def _add_starter(parser: argparse.ArgumentParser, config: type) -> None:
    helps = settings_of(config)
    for name in ("student", "teacher", "data"):
        parser.add_argument(name, metavar=name.upper(), help=helps[name].help)
    parser.add_argument("--chat", action="store_true", help=helps["chat"].help)


class Command(NamedTuple):
    """A subcommand: `function` takes the config; it is imported when the command runs."""

    config: type
    function: str  # module:name, within fastkl.trainer
    help: str
    usage: str = "CONFIG.yaml [--key value ...]"
    dry_run: str = ""  # the function that only checks and estimates, if there is one
    add_arguments: Callable[[argparse.ArgumentParser, type], None] = _add_settings
    other: type | None = None  # what it takes where nothing is set that `config` alone has
    flags: tuple[str, ...] = ()  # settings that are true where they stand without a value

    @property
    def takes_settings(self) -> bool:
        return self.add_arguments is _add_settings


COMMANDS = {
    "init": Command(
        InitConfig,
        "commands.starter:print_starter",
        "print a first config for a student, a teacher and a file of prompts",
        usage="[--chat] STUDENT TEACHER DATA > run.yaml",
        add_arguments=_add_starter,
    ),
    "distill": Command(
        DistillConfig,
        "distill:distill",
        "distil a teacher into a student, on the student's samples",
        dry_run="commands.dry_run:dry_distill",
        usage="CONFIG.yaml [--key value ...] [--dry-run]",
    ),
    "sft": Command(
        SftConfig,
        "sft:sft",
        "fine-tune a student on given completions (the stage before distillation)",
        dry_run="commands.dry_run:dry_sft",
        usage="CONFIG.yaml [--key value ...] [--dry-run]",
    ),
    "plan": Command(
        DistillPlan,
        "commands.plan.command:print_plan",
        "tell the memory, FLOPs and hours of a config on devices that need not be here",
        usage="CONFIG.yaml [--processes N] [--device NAME] [--accelerate FILE] [--key value ...]",
        other=SftPlan,
    ),
    "probe": Command(
        ProbeConfig,
        "commands.probe.command:probe",
        "tell whether a student can learn from its teacher, before a run",
        usage="CONFIG.yaml [--prompts N] [--json] [--output FILE] [--key value ...]",
        flags=("json",),
    ),
    "eval": Command(
        EvaluateConfig,
        "commands.evaluate:evaluate_model",
        "let a model answer prompts, and grade it",
        usage="CONFIG.yaml | RUN [--key value ...]",
    ),
    "sample": Command(
        SampleConfig,
        "commands.sample:sample_completions",
        "let a model complete prompts, into a file that sft reads",
        usage="CONFIG.yaml | RUN [--key value ...]",
    ),
    "score": Command(
        ScoreConfig,
        "commands.score:score_completions",
        "write log-probs of given completions to a file",
        usage="CONFIG.yaml | RUN [--key value ...]",
    ),
    "report": Command(
        ReportConfig,
        "runs.report.page:report",
        "draw a run, or several on the same axes, as one HTML page",
        usage="RUN [RUN ...] [--output FILE]",
        add_arguments=_add_runs,
    ),
}


def load(name: str, dry: bool = False) -> Callable[[Any], object]:
    """The function of a command; this is what imports torch, where it is needed."""
    command = COMMANDS[name]
    module, function = (command.dry_run if dry else command.function).split(":")
    found: Callable[[Any], object] = getattr(importlib.import_module(f"fastkl.trainer.{module}"), function)
    transformers = sys.modules.get("transformers")
    if transformers is not None and not sys.stderr.isatty():  # its bars are for a terminal
        transformers.logging.disable_progress_bar()
    return found


def split_dry_run(argv: list[str]) -> tuple[list[str], bool]:
    """The command line without --dry-run, and whether it was there; of other commands it is no setting."""
    known = bool(argv) and argv[0] in COMMANDS and bool(COMMANDS[argv[0]].dry_run)
    return [word for word in argv if not known or word != DRY_RUN], known and DRY_RUN in argv


def parse(argv: list[str]) -> tuple[str, Any]:
    """The command's name and its config: the YAML file first, then the overrides.

    Raises:
        ConfigError: For a setting that does not exist or cannot have its value, with the file and the line.
        SystemExit: After --help and --version, and where no command is named.
    """
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None or not command.takes_settings or {"-h", "--help"} & {*argv}:
        values = vars(parser().parse_args(argv))
        name = values.pop("command")
        return name, COMMANDS[name].config(**(_with_paths(values) if name == "report" else values))
    return argv[0], _with_settings(argv[0], argv[1:])


def parser() -> argparse.ArgumentParser:
    """What argparse, and shtab for a shell's completion, know of the command line."""
    whole = argparse.ArgumentParser(
        prog="fastkl",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"fastkl {__version__}")
    commands = whole.add_subparsers(required=True, dest="command", title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        title = command.help[0].upper() + command.help[1:] + "."
        one = commands.add_parser(
            name,
            help=command.help,
            description=title,
            usage=f"fastkl {name} {command.usage}",
            allow_abbrev=False,
        )
        command.add_arguments(one, command.config)
        if command.dry_run:
            one.add_argument(DRY_RUN, action="store_true", help=DRY_RUN_HELP)
    return whole


def _with_paths(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `fastkl report`, which are all paths."""
    output = values["output"]
    return {
        "runs": [expanded(run, "RUN") for run in values["runs"]],
        "output": None if output is None else expanded(output, "--output"),
    }


def _with_settings(name: str, words: list[str]) -> Any:
    """The config of a command that takes settings."""
    if not words:
        raise ConfigError(f"name a config: fastkl {name} {COMMANDS[name].usage}. `fastkl init` prints a first one")
    found = list(_places(name, words))
    settings = Settings(_kind(COMMANDS[name], found), lambda setting: _elsewhere(name, setting))
    renamed = [pair for setting, value, _ in found for pair in flat({setting: _plain(value)})]
    refuse_renamed(renamed, "Write the new names")
    for setting, value, place in found:
        node = node_of(value, settings.kind_of(setting, place)) if isinstance(value, str) else value
        settings.add(setting, node, place)
    config = settings.build()
    for setting, (value, _) in settings.given.items():
        if setting.rpartition(".")[2] == "path" and isinstance(value, str):
            note_of_student(Path(value))
    return config


def _kind(command: Command, found: list[tuple[str, yaml.Node | str, Place]]) -> type:
    """The config that is meant by what is set."""
    if command.other is None:
        return command.config
    own = {*settings_of(command.config)} - {*settings_of(command.other)}
    return command.config if own & {setting.partition(".")[0] for setting, _, _ in found} else command.other


def _places(name: str, words: list[str]) -> Iterator[tuple[str, yaml.Node | str, Place]]:
    """Each setting of the file and of the command line, there as text, in the order in which they count."""
    if not words[0].startswith("--"):
        words = ["--config", *words]
    left = iter(words)
    for word in left:
        setting, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is no setting; write --name value, or one CONFIG.yaml before all settings")
        if setting.replace("_", "-") == DRY_RUN.removeprefix("--"):
            raise ConfigError(f"{word} is no setting; {_dry_run(name)}")
        if not equals and setting in COMMANDS[name].flags:
            value = "true"
        elif not equals:
            value = next(left, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{setting} has no value; write --{setting} value")
        if setting == "config":
            path = Path(expanded(value, "config"))
            yield from settings_of_run(name, path) if path.is_dir() else read_file(path)
        else:
            yield setting, value, Place()


def _dry_run(name: str) -> str:
    """Which commands can be tried without a run."""
    if COMMANDS[name].dry_run:
        return f"did you mean {DRY_RUN}?"
    having = " and ".join(f"fastkl {other}" for other, command in COMMANDS.items() if command.dry_run)
    return f"{having} have {DRY_RUN}, fastkl {name} has not"


def _elsewhere(name: str, setting: str) -> str:
    """That a setting belongs to another command, which a config was written for."""
    others = [
        other
        for other, command in COMMANDS.items()
        if command.takes_settings and other != name and setting in full_names(command.config, groups=True)
    ]
    others = [
        other for other in others if COMMANDS[other].other is None
    ] or others  # a plan has those of all that train
    if not others:
        return ""
    own = ", ".join(settings_of(COMMANDS[name].config))
    return f"it belongs to fastkl {' and '.join(others)}. fastkl {name} {COMMANDS[name].usage} takes {own}"


def _plain(value: yaml.Node | str, depth: int = 4) -> Any:
    """Names and words, without types; not deeper than any setting is, for a file may refer to itself."""
    if isinstance(value, yaml.MappingNode):
        return {str(key.value): _plain(below, depth - 1) for key, below in value.value} if depth else None
    return value if isinstance(value, str) else value.value
