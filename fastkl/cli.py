"""The command `fastkl`: distill, sft, eval, score, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence

MISSING_EXTRA = "fastkl's trainer needs packages that are not installed ({0}): pip install 'fastkl[trainer]'"

INTERRUPTED = "fastkl: interrupted; a training run goes on from its last checkpoint, if it has one, by the same command"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status. Errors a user can mend are one line on stderr, status 2.

    Of several processes that end together, one says why.
    """
    try:
        from fastkl.trainer.commands import command_line as commands
        from fastkl.trainer.errors import ConfigError, RunError
        from fastkl.trainer.runs import processes
        from fastkl.trainer.runs.stop import Stopped
    except ModuleNotFoundError as error:
        print(MISSING_EXTRA.format(error.name), file=sys.stderr)
        return 2
    try:
        commands.run(list(sys.argv[1:] if argv is None else argv))
    except (ConfigError, RunError) as error:
        _say(f"fastkl: {error}", processes.failed_first())
        return 2
    except Stopped as stopped:
        _say(f"fastkl: {stopped}", processes.failed_first())
        return stopped.exit_status
    except KeyboardInterrupt:
        _say(INTERRUPTED, processes.failed_first())
        return 130
    except Exception:
        if processes.failed_first(unless_known=True):
            raise
        return 1
    return 0


def _say(text: str, aloud: bool) -> None:
    if aloud:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main()
    if status == 0:
        from fastkl.trainer.runs import processes

        processes.leave()
    sys.exit(status)
