"""The command `fastkl`: distill, sft, eval, score."""

from __future__ import annotations

import sys
from collections.abc import Sequence

MISSING_EXTRA = "fastkl's trainer needs packages that are not installed ({0}): pip install 'fastkl[trainer]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status. Errors a user can mend are one line on stderr, status 2."""
    try:
        from fastkl.trainer import commands
        from fastkl.trainer.config.errors import ConfigError
        from fastkl.trainer.servers.errors import ServerError
    except ModuleNotFoundError as error:
        print(MISSING_EXTRA.format(error.name), file=sys.stderr)
        return 2
    try:
        commands.run(list(sys.argv[1:] if argv is None else argv))
    except (ConfigError, ServerError) as error:
        print(f"fastkl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "fastkl: interrupted; a training run goes on from its last checkpoint, if it has one, by the same command",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
