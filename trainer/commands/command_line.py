"""The subcommands of `fastkl`: what each takes, from a YAML file and the command line, and what it runs."""

from __future__ import annotations

from typing import Any

import transformers
from jsonargparse import ArgumentParser

from fastkl.trainer.config.offline import EvaluateConfig, ReportConfig, ScoreConfig
from fastkl.trainer.config.training import DistillConfig, SftConfig

DESCRIPTION = (
    "On-policy distillation of language models. A command takes CONFIG.yaml and --key value overrides; report takes run "
    "folders."
)
COMMANDS: dict[str, tuple[type, str]] = {
    "distill": (DistillConfig, "distil a teacher into a student, on the student's own samples"),
    "sft": (SftConfig, "fine-tune a student on given completions (the stage before distillation)"),
    "eval": (EvaluateConfig, "answer prompts with a model and grade the answers"),
    "score": (ScoreConfig, "write a model's log-probs of given completions to a JSONL file"),
}
REPORT_HELP = "draw a run, or several on the same axes, as one HTML page"


def run(argv: list[str]) -> None:
    """Parses a command line and runs its command."""
    name, config = parse(argv)
    transformers.logging.disable_progress_bar()
    if name == "distill":
        from fastkl.trainer.distill import distill

        distill(config)
    elif name == "sft":
        from fastkl.trainer.sft import sft

        sft(config)
    elif name == "eval":
        from fastkl.trainer.commands.evaluate import evaluate_model

        evaluate_model(config)
    elif name == "report":
        from fastkl.trainer.runs.report.page import report

        report(config)
    else:
        from fastkl.trainer.commands.score import score_completions

        score_completions(config)


def parse(argv: list[str]) -> tuple[str, Any]:
    """The command's name and its config: the YAML file first, then the overrides."""
    if len(argv) > 1 and argv[0] in COMMANDS and not argv[1].startswith("-"):
        argv = [argv[0], "--config", *argv[1:]]
    parser = _parser()
    values = parser.instantiate(parser.parse_args(argv))
    name: str = values.command
    settings = vars(values[name])
    settings.pop("config", None)
    return name, (ReportConfig if name == "report" else COMMANDS[name][0])(**settings)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fastkl", description=DESCRIPTION)
    commands = parser.add_subcommands(required=True, dest="command", title="commands", metavar="COMMAND")
    for name, (config, help_text) in COMMANDS.items():
        command = ArgumentParser(
            description=help_text[0].upper() + help_text[1:] + ".", usage=f"fastkl {name} CONFIG.yaml [--key value ...]"
        )
        command.add_argument("--config", action="config", help="YAML file with any of the settings below.")
        command.add_class_arguments(config, None)
        commands.add_subcommand(name, command, help=help_text)
    commands.add_subcommand("report", _report_parser(), help=REPORT_HELP)
    return parser


def _report_parser() -> ArgumentParser:
    command = ArgumentParser(
        description=REPORT_HELP[0].upper() + REPORT_HELP[1:] + ".", usage="fastkl report RUN [RUN ...] [--output FILE]"
    )
    command.add_argument("runs", nargs="+", type=str, metavar="RUN", help="Run folders.")
    command.add_argument(
        "--output",
        type=str,
        metavar="FILE",
        help="HTML file to write, in place of an older report if need be; of one run, report.html in its folder.",
    )
    return command
