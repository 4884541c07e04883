"""The entry point. A bench is a module with `add_arguments(parser)` and `run(arguments, parser)`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench.commands import count, gpu, kernels, loss, models, plot, sparse, table, train

BENCHES = {
    "loss": loss,
    "sparse": sparse,
    "plot": plot,
    "table": table,
    "kernels": kernels,
    "count": count,
    "models": models,
    "train": train,
    "gpu": gpu,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benches of fastkl.")
    commands = parser.add_subparsers(dest="bench", required=True, metavar="{" + ",".join(BENCHES) + "}")
    for name, module in BENCHES.items():
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
