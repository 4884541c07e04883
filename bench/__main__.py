"""The entry point. A command is a file of bench/commands/ with `add_arguments(parser)` and `run(arguments, parser)`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = (
    "loss",
    "models",
    "sparse",
    "estimators",
    "train",
    "integrations",
    "plot",
    "table",
    "kernels",
    "count",
    "gpu",
    "host",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benches of fastkl.")
    commands = parser.add_subparsers(dest="bench", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name in COMMANDS:
        module = importlib.import_module(f"bench.commands.{name}")
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    arguments = parser.parse_args(argv)
    arguments.run(arguments, arguments.parser)


if __name__ == "__main__":
    main()
