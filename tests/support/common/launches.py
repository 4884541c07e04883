"""Commands and code in processes of their own: alone, several that learn together, one that is killed."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_models import CHARACTERS

from fastkl import cli
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler

REPOSITORY = Path(__file__).resolve().parents[3]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as `accelerate launch` has it
}
# A server that has imported everything forks the processes: each starts in no time, and from a clean state.
CONTEXT = multiprocessing.get_context("forkserver")
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
    store = _store()
    errors.mkdir(exist_ok=True)
    running = []
    for rank in range(count):
        environment = _environment(rank, count, store.port, fsdp)
        first = (before or {}).get(rank)
        process = CONTEXT.Process(target=_join, args=(command_line, environment, errors / f"{rank}.txt", first))
        process.start()
        running.append(process)
    for process in running:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in running], [(errors / f"{rank}.txt").read_text() for rank in range(count)]


def _store() -> torch.distributed.TCPStore:
    """Where processes meet, as a launcher has it. A port that is free now may be somebody's when a process wants it."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _environment(rank: int, count: int, port: int, fsdp: bool) -> dict[str, str]:
    """As a launcher gives it to a process."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **(FSDP if fsdp else {}),
    }


def _join(command_line: list[str], environment: dict[str, str], errors: Path, first: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if first is not None:
        first()
    sys.exit(cli.main(command_line))


@contextmanager
def alone_in_group() -> Iterator[None]:
    """While open, this process is a group (gloo) by itself."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def in_group(
    function: Callable[..., Any], *args: Any, count: int = 2, fsdp: bool = False, timeout: float = 600
) -> list[Any]:
    """What `function(rank, count, *args)`, importable from here, returns in each process of a group (gloo)."""
    store, running = _store(), []
    for rank in range(count):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_in_group, args=(theirs, _environment(rank, count, store.port, fsdp), function, args)
        )
        process.start()
        theirs.close()
        running.append((process, ours))
    results = []
    for process, ours in running:
        results.append(pickle.loads(ours.recv_bytes()) if ours.poll(timeout) else TimeoutError(f"none in {timeout} s"))
        process.join(timeout)
        process.kill()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _in_group(answer: Any, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        result = function(rank, count, *args)
    except BaseException as error:
        result = RuntimeError("".join(traceback.format_exception(error)))
    answer.send_bytes(pickle.dumps(result))  # whole tensors, not where they lie: this process ends
    torch.distributed.destroy_process_group()


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
