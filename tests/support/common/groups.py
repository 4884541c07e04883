"""Processes of one group (gloo), and this one as a group by itself. Nothing of a trainer is imported for them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as `accelerate launch` has it
}
# A server that has imported what takes long forks the processes: each starts in no time, and from a clean state.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed"])


def meeting_place() -> torch.distributed.TCPStore:
    """Where processes meet, as a launcher has it. A port that is free now may be somebody's when a process wants it."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environment(rank: int, count: int, port: int, fsdp: bool) -> dict[str, str]:
    """As a launcher gives it to a process."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **(FSDP if fsdp else {}),
    }


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
    store, running = meeting_place(), []
    for rank in range(count):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_in_group, args=(theirs, environment(rank, count, store.port, fsdp), function, args)
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


def _in_group(answer: Any, variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        result = function(rank, count, *args)
    except BaseException as error:
        result = RuntimeError("".join(traceback.format_exception(error)))
    answer.send_bytes(pickle.dumps(result))  # whole tensors, not where they lie: this process ends
    torch.distributed.destroy_process_group()
