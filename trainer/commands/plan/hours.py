"""The hours of a step by phase, from datasheets and assumed shares of their peaks. No rate here was measured.

Not counted: communication, waiting, the host's work between kernels, loading and saving.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastkl.trainer.commands.plan import sizes
from fastkl.trainer.commands.plan.devices import DEVICES, PRODUCTS
from fastkl.trainer.commands.plan.parts import AUTOCAST
from fastkl.trainer.commands.plan.run import Run, Scorer
from fastkl.trainer.commands.plan.work import SAMPLING, work
from fastkl.trainer.config.offline import Assumptions
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.rollouts.samplers.in_progress import in_progress

SERVED = 256  # completions that one device of a sampling server decodes at once


class Duration(NamedTuple):
    """Of a phase."""

    name: str
    hours: float
    why: str  # what it is bound by, in words


def durations(run: Run, assumed: Assumptions) -> Iterator[Duration]:
    """The hours of each phase of a step; nothing on a CPU, of which no datasheet tells."""
    if assumed.device == "cpu":
        return
    device, scorers = DEVICES[assumed.device], {scorer.name: scorer for scorer in run.scorers}
    for name, flops in work(run):
        dtype = _dtype(run, scorers.get(name), name)
        products = flops / run.processes.count / device.flops(dtype) / assumed.flops_share
        seconds, why = products, f"{PRODUCTS[dtype]} products"
        if name == SAMPLING:
            reading = _bytes_read(run, dtype) / (device.bandwidth * 1e12 * assumed.bandwidth_share)
            seconds, why = max((products, why), (reading, "weights, keys and values that decoding reads"))
        yield Duration(name, seconds / 3600, why)


def _dtype(run: Run, scorer: Scorer | None, name: str) -> torch.dtype:
    """In which a phase multiplies."""
    config, own = run.config, run.student.dtype
    if scorer is not None:
        return scorer.model.dtype
    if name == SAMPLING and isinstance(config, DistillConfig):
        if config.sampling.server.url:
            return torch.bfloat16  # what a server makes of weights in float32 too
        return own if config.sampling.dtype is None else getattr(torch, config.sampling.dtype)
    return AUTOCAST[config.mixed_precision] or own


def _bytes_read(run: Run, dtype: torch.dtype) -> float:
    """By one device, while it decodes its share of the completions: all weights for each new token, and all keys so far."""
    config = run.config
    assert isinstance(config, DistillConfig)
    share = -(-len(run.samples) // run.processes.count)
    longest = max(len(sample.ids) for sample in run.samples)
    at_once = SERVED if config.sampling.server.url else in_progress(config.sampling, share, longest, False).completions
    weights = sizes.weights(run.student) / run.student.dtype.itemsize * dtype.itemsize
    new = sum(sample.loss_tokens for sample in run.typical) / run.processes.count
    keys = sum(
        sizes.keys(run.student, len(sample.ids) - sample.loss_tokens / 2) * sample.loss_tokens for sample in run.typical
    )
    return new / min(at_once, share) * weights + keys / run.processes.count * dtype.itemsize
