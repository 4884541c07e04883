"""The command `fastkl`: init, probe, plan, distill, sft, eval, sample, score, report."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastkl._extras import install_command

MISSING_EXTRA = "fastkl's trainer needs packages that are not installed ({0}): {1}"

INTERRUPTED = "fastkl: interrupted; a training run goes on from its last checkpoint, if it has one, by the same command"
TERMINATED = "fastkl: ended by SIGTERM; the same command goes on from what is written, if anything is"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status. Errors a user can mend are one line on stderr, status 2.

    Of several processes that end together, one says why.
    """
    try:
        with _ended_at_once(signal.SIGINT, INTERRUPTED):
            from fastkl.trainer.errors import ConfigError

            try:
                command, config = _command(list(sys.argv[1:] if argv is None else argv))
            except ConfigError as error:
                return _say(f"fastkl: {error}", 2, aloud=_first_of_launch())
    except ModuleNotFoundError as error:
        return _say(MISSING_EXTRA.format(error.name, install_command("trainer")), 2, aloud=_first_of_launch())
    return _run(command, config)


def _command(argv: list[str]) -> tuple[Callable[[Any], object], Any]:
    """What to run, and its config; the imports that take long come last, once the config is found good."""
    from fastkl.trainer.commands import command_line as commands

    argv, dry = commands.split_dry_run(argv)
    name, config = commands.parse(argv)
    return commands.load(name, dry), config


def _run(command: Callable[[Any], object], config: Any) -> int:
    from fastkl.trainer.errors import ConfigError, RunError

    try:
        with _ended_at_once(signal.SIGTERM, TERMINATED):
            command(config)
    except (ConfigError, RunError) as error:
        return _say(f"fastkl: {error}", getattr(error, "exit_status", 2), aloud=_failed_first())
    except KeyboardInterrupt as stopped:  # a run's own says where it goes on, and which signal it was
        text = f"fastkl: {stopped}" if str(stopped) else INTERRUPTED
        return _say(text, getattr(stopped, "exit_status", 130), aloud=_failed_first())
    except Exception:
        if _failed_first(unless_known=True):
            raise
        return 1
    return 0


def _failed_first(unless_known: bool = False) -> bool:
    """Whether this process says why; a command that joins no others has not imported them either."""
    processes = sys.modules.get("fastkl.trainer.runs.processes")
    return processes is None or bool(processes.failed_first(unless_known))


def _say(text: str, status: int, aloud: bool) -> int:
    from fastkl.trainer.notes import printable

    if aloud:
        print(printable(text), file=sys.stderr, flush=True)
    return status


def _first_of_launch() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _ended_at_once(by: signal.Signals, text: str) -> Iterator[None]:
    """While open, a signal ends the process at once, in one line: an import that is cut off may raise anything, or go on.

    The steps of a run have a better way (`trainer/runs/stop.py`).
    """

    def end(number: int, frame: FrameType | None) -> None:
        if _first_of_launch():
            os.write(2, f"{text}\n".encode())
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(by, end)
    try:
        yield
    finally:
        signal.signal(by, before)


if __name__ == "__main__":
    status = main()
    if status == 0 and (processes := sys.modules.get("fastkl.trainer.runs.processes")):
        processes.leave()
    sys.exit(status)
