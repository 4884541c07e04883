"""The optimizer of a model and its learning rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastkl.trainer.config.optim import OptimConfig

DECAYS = "decays"  # an entry of a parameter group


def make_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW on the parameters that are trained. Norms and biases, which have one dimension, do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], DECAYS: True},
        {"params": [p for p in trained if p.dim() <= 1], DECAYS: False},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        fused=True,  # one pass over the weights: a ninth of the time on a CPU
    )
    _set_decay(config, optimizer)
    return optimizer


def learning_rate_schedule(config: OptimConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up that reaches the peak with step `warmup_steps`, then the schedule down to 0 after the last step.

    The first step already learns: a rollout is too dear for a step at rate 0.
    """
    decay = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2,
    }

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        return decay[config.schedule]((step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def apply_settings(
    config: OptimConfig, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR
) -> None:
    """Gives both the config's settings, after a checkpoint of other ones; moments and the step's number stay."""
    scheduler.base_lrs = [config.lr] * len(optimizer.param_groups)
    rates = [config.lr * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, initial_lr=config.lr, betas=(config.betas[0], config.betas[1]))
    _set_decay(config, optimizer)
    scheduler._last_lr = [*rates]


def _set_decay(config: OptimConfig, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay if group[DECAYS] else 0.0
