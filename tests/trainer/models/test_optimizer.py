"""Weight decay: matrices alone, before and after a run goes on with another one."""

from __future__ import annotations

import torch
from tiny_models import causal_lm

from fastkl.trainer.config.optim import OptimConfig
from fastkl.trainer.models.optimizer import apply_settings, learning_rate_schedule, make_optimizer


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {parameter.dim(): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}


def test_norms_and_biases_do_not_decay() -> None:
    model = causal_lm("gpt2")
    settings = OptimConfig(lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(settings, model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_another_decay() -> None:
    model = causal_lm("gpt2")
    optimizer = make_optimizer(OptimConfig(weight_decay=0.5), model)
    settings = OptimConfig(weight_decay=0.25)
    apply_settings(settings, optimizer, learning_rate_schedule(settings, optimizer))
    assert decays(optimizer) == {1: 0.0, 2: 0.25}


def test_without_vectors_there_is_one_group() -> None:
    model = causal_lm()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    assert decays(make_optimizer(OptimConfig(), model)) == {2: 0.0}
