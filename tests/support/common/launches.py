"""Commands and code in processes of their own: alone, several that learn together, one that is killed."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from groups import CONTEXT, environment, meeting_place
from tiny_models import CHARACTERS

from fastkl import cli
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler

REPOSITORY = Path(__file__).resolve().parents[3]
# A server that has imported everything forks the processes: each starts in no time, and from a clean state.
CONTEXT.set_forkserver_preload(["fastkl.trainer.distill", "fastkl.trainer.sft", "fastkl.cli"])


def run_python(code: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with `code`; stdout and stderr come back as text."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        **options,
    )


def die_at(command_line: list[str], target: str, call: int, after: bool) -> None:
    """Runs a command, and kills the process with SIGKILL before or after so-many-th call of `module:function`."""
    torch.set_num_threads(1)
    module, _, name = target.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == call
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)
    cli.main(command_line)


def killed(command_line: list[str], target: str, call: int, after: bool) -> bool:
    """Whether `die_at`, in a process of its own, came to its end by the signal."""
    process = CONTEXT.Process(target=die_at, args=(command_line, target, call, after))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def together(
    command_line: list[str],
    errors: Path,
    *,
    count: int = 2,
    fsdp: bool = False,
    before: Mapping[int, Callable[[], None]] | None = None,
    timeout: float = 600,
) -> tuple[list[int | None], list[str]]:
    """A command in several processes as a launcher starts them: their exit statuses and what each said on stderr."""
    store = meeting_place()
    errors.mkdir(exist_ok=True)
    running = []
    for rank in range(count):
        variables = environment(rank, count, store.port, fsdp)
        first = (before or {}).get(rank)
        process = CONTEXT.Process(target=_join, args=(command_line, variables, errors / f"{rank}.txt", first))
        process.start()
        running.append(process)
    for process in running:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in running], [(errors / f"{rank}.txt").read_text() for rank in range(count)]


def _join(command_line: list[str], variables: dict[str, str], errors: Path, first: Callable[[], None] | None) -> None:
    os.environ.update(variables)
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if first is not None:
        first()
    sys.exit(cli.main(command_line))


def give_samples() -> None:
    """From here on, completions depend on their prompt alone; greedy ones are still the model's."""
    for engine in (ContinuousBatchingSampler, GenerateSampler):
        engine.sample = _given(engine.sample)  # type: ignore[method-assign]


def _given(sample: Callable[..., list[Completion]]) -> Any:
    def given(self: Any, prompts: list[list[int]], *, temperature: float, max_new_tokens: int, seed: int) -> Any:
        if temperature == 0:
            return sample(self, prompts, temperature=0, max_new_tokens=max_new_tokens, seed=seed)
        found = []
        for prompt in prompts:
            random = torch.Generator().manual_seed(sum(prompt))
            length = 1 + sum(prompt) % max_new_tokens
            ids = torch.randint(1, len(CHARACTERS), (length,), generator=random).tolist()
            logprobs = (-3 - torch.rand(length, generator=random)).tolist()
            found.append(Completion(ids, logprobs, truncated=length == max_new_tokens))
        return found

    return given
