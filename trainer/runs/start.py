"""How a run begins: its processes, its trackers, its folder."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from fastkl.trainer.config.training import RunConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.folder import check_run_folder


def start_run(config: RunConfig, samples: int, name: str) -> Accelerator:
    """Joins the processes, if there are several, for steps of so many samples, which the setting called `name` decides."""
    check_trackers(config.trackers)
    accelerator = processes.start(config)
    check_sample_count(samples, name)
    check_precision(config, accelerator.device.type)
    processes.on_main(lambda: check_run_folder(config))
    return accelerator


def check_precision(config: RunConfig, device: str) -> None:
    """No float16 where nothing is made for it."""
    for name, value, others in (
        ("student.dtype", config.student.dtype, "bfloat16 or float32"),
        ("mixed_precision", config.mixed_precision, "bf16 or no"),
    ):
        if device == "cpu" and value in ("float16", "fp16"):
            raise ConfigError(f"{name} is {value}, in which a CPU does not train; set it to {others}")


def check_trackers(names: list[str]) -> None:
    """accelerate drops a tracker that is not installed without a word."""
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in (*installed, "all"):
            raise ConfigError(
                f"trackers has {name!r}, which is not installed or unknown to accelerate (installed here: "
                f"{', '.join(installed) or 'none'}); install it or leave it out, metrics.jsonl is always written"
            )


def check_sample_count(samples: int, name: str) -> None:
    """Every process has a sample in each step."""
    if samples < processes.count():
        raise ConfigError(
            f"a step has {samples} samples for {processes.count()} processes; raise {name} or start fewer processes"
        )
