"""The processes of a run, one for each device (`accelerate launch`): shares, exchange, and how they fail together.

With one process nothing is exchanged. Every function here is called by all processes, at the same point of the run.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, disable_fsdp_ram_efficient_loading
from torch.distributed.fsdp import MixedPrecisionPolicy

from fastkl.trainer.config.training import RunConfig, as_dict
from fastkl.trainer.errors import ConfigError

T = TypeVar("T")

PATIENCE = timedelta(hours=6)  # how long one waits for the slowest: a rollout, a teacher that is away
M_MMAP_THRESHOLD = -3  # of <malloc.h>
LARGE = 2**20  # bytes
KNOWN = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")

# Freed while a thread of its own lets go of a tensor, gloo's group would wait for that, and the thread for Python's lock.
_kept_until_exit: list[Any] = []
_failed_first: bool | None = None


def start(config: RunConfig) -> Accelerator:
    """Joins the processes, if there are several; refuses what this trainer cannot be run with."""
    disable_fsdp_ram_efficient_loading()  # it would leave a teacher without weights on every process but the first
    on_cpu = join().distributed_type == DistributedType.MULTI_CPU
    if on_cpu:
        give_back_large_blocks()
        # accelerate shards on accelerators alone; what it does there runs on CPUs as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.run,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if on_cpu:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        if accelerator.distributed_type == DistributedType.MULTI_GPU:
            accelerator.state.distributed_type = DistributedType.MULTI_CPU
    if count() > 1:
        _kept_until_exit.append(dist.group.WORLD)
    _check(accelerator)
    settings = gather([repr(as_dict(config))])
    if len(set(settings)) > 1:
        raise ConfigError(f"the {count()} processes were started with different configs; give all of them the same one")
    return accelerator


def join() -> PartialState:
    """Joins the processes, if there are several; says which device is this one's."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=several and not torch.cuda.is_available(), timeout=PATIENCE) if several else PartialState()


def give_back_large_blocks() -> None:
    """From now on glibc gives blocks of a MiB or more back to the kernel when they are freed.

    By itself it raises that limit up to 32 MiB, and keeps smaller blocks in its heap. There buckets, and layers that FSDP
    gathers and lets go of, lie between activations, which stay: the heap grows by more than what is alive, in each process.
    It costs page faults, so one process goes without. `MALLOC_MMAP_THRESHOLD_` in the environment has the last word.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE)


def leave() -> None:
    """Ends this process at once, as a success, if it was one of several.

    A thread of gloo that lets go of its last tensor while the interpreter is being taken down would abort a finished run.
    One that failed goes the long way, on which trackers write what they still hold.
    """
    if _kept_until_exit:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def my_share(items: Sequence[T]) -> list[T]:
    """This process's part of what all share: a piece, in order, as long as the others' to within one."""
    return list(items[len(items) * rank() // count() : len(items) * (rank() + 1) // count()])


def first_alone(items: Sequence[T]) -> list[T]:
    """Everything on the first process, nothing on the others."""
    return list(items) if rank() == 0 else []


def seed(common: int) -> int:
    """A seed of this process's own; the common one on the first."""
    return common + (rank() << 32)


def gather(items: list[T]) -> list[T]:
    """The processes' lists end to end, on every process."""
    if count() == 1:
        return items
    everyone: list[Any] = [None] * count()
    dist.all_gather_object(everyone, items)
    return [item for part in everyone for item in part]


def add(mine: Mapping[str, float]) -> dict[str, float]:
    """The sums of the processes' numbers by name."""
    total: dict[str, float] = {}
    for part in gather([dict(mine)]):
        for name, number in part.items():
            total[name] = total.get(name, 0) + number
    return total


def on_main(function: Callable[[], T]) -> T:
    """What it returns on the first process, where alone it runs; what it raises there, all raise."""
    mine = raise_together(lambda: [function()] if rank() == 0 else [])
    return gather(mine)[0]


def raise_together(function: Callable[[], T]) -> T:
    """What it returns here; but what it raises on any process, all raise. It must not wait for the others."""
    global _failed_first
    if count() == 1:
        return function()
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        failed_first()  # here is where it happened, and where the message is the best
        error = raised
    errors = gather([] if error is None else [_portable(error)])
    if error is None and errors:
        _failed_first, error = False, errors[0]
    if error is not None:
        raise error
    return result


def failed_first(unless_known: bool = False) -> bool:
    """Whether this process is the one to say what went wrong: the first that asks; `unless_known` if that is lost."""
    global _failed_first
    if _failed_first is None:
        try:
            store = dist.distributed_c10d._get_default_store() if count() > 1 else None
            _failed_first = store is None or store.add("fastkl/failed", 1) == 1
        except RuntimeError:  # the process that kept the score is gone
            _failed_first = unless_known
    return _failed_first


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"process {rank()}: {error!r}")
    return error


def _check(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type.value
    if kind not in KNOWN:
        raise ConfigError(f"accelerate was started with distributed_type {kind}; this trainer knows DDP and FSDP 2")
    if kind != "FSDP" and count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            f"accelerate was asked for FSDP and gave {kind}; start it with recipes/accelerate/ddp.yaml for DDP"
        )
    plugin = accelerator.state.fsdp_plugin if kind == "FSDP" else None
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ConfigError(f"fsdp_version is {plugin.fsdp_version}; this trainer knows 2: --fsdp_version 2")
    if plugin.activation_checkpointing:
        raise ConfigError(
            "fsdp_activation_checkpointing is true; set it to false and student.gradient_checkpointing to true"
        )
    if str(os.environ.get("FSDP_OFFLOAD_PARAMS", "false")).lower() in ("true", "1"):
        raise ConfigError("fsdp_offload_params is true; this trainer keeps its shards on the device: set it to false")
    if accelerator.mixed_precision == "fp16":
        raise ConfigError(
            "mixed_precision is fp16 under FSDP 2, which this trainer does in bf16 or no; set one of them"
        )
    if (
        accelerator.mixed_precision == "bf16"
    ):  # accelerate would round losses, log-probs and summed gradients to bf16 too
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
