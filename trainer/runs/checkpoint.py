"""Checkpoints that know nothing of how many processes wrote them: whole tensors, written by the first process.

model.safetensors has the trained weights (of LoRA, the adapter alone), optimizer.bin the optimizer's state_dict, state.pt
the scheduler, the gradient scaler and the random states of all processes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs import processes

WEIGHTS, OPTIMIZER, STATE = FILES = ("model.safetensors", "optimizer.bin", "state.pt")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, once: no frozen base under a LoRA adapter, no second name of a tied weight.

    The names begin with what older versions put around a model: their checkpoints stay readable.
    """
    return {f"model.{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[str, Any]) -> None:
    """Gathers everything, then writes it on the first process; OSError where that fails."""
    weights = {name: whole(parameter.detach()) for name, parameter in trained(model).items()}
    moments = tree_map_only(Tensor, whole, optimizer.state_dict())
    random = processes.gather([_random_state()])
    states = {name: other.state_dict() for name, other in others.items()}

    def write() -> None:
        try:
            save_file(weights, folder / WEIGHTS)
            torch.save(moments, folder / OPTIMIZER)
            torch.save({"random": random, **states}, folder / STATE)
        except (SafetensorError, RuntimeError) as error:  # their words for a full disk
            raise OSError(str(error)) from error

    processes.on_main(write)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[str, Any]) -> None:
    """Every process reads the files and takes its shards. Random states are restored where there are as many as then."""
    load_weights(folder, model)
    optimizer.load_state_dict(_split(optimizer, torch.load(folder / OPTIMIZER, map_location="cpu")))
    states = torch.load(folder / STATE, map_location="cpu")
    for name, other in others.items():
        if name in states:  # an older version knew fewer
            other.load_state_dict(states[name])
    if len(states["random"]) == processes.count():
        _set_random_state(states["random"][processes.rank()])


def load_weights(folder: Path, model: nn.Module) -> None:
    """The trained weights alone."""
    weights, parameters = load_file(folder / WEIGHTS), trained(model)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != wanted:
        names = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise ConfigError(
            f"{folder} is not a checkpoint of this student: {names[0]} is {shapes.get(names[0], 'missing')} there and "
            f"{wanted.get(names[0], 'missing')} in the student. Give the run's student back, or choose another run folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(parameter, weights[name]))


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, gathered from its shards; empty but on the first process."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu().clone() if processes.rank() == 0 else full.new_empty(0)


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as the parameter is: this process's shard of it, on its device."""
    whole = whole.to(device=parameter.device, dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return whole


def _split(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state_dict with this process's shards in place of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards: dict[int, Any] = {}
    for index, values in state["state"].items():
        shards[index] = tree_map_only(Tensor, partial(_like_if_shaped, parameters[index]), values)
    return {**state, "state": shards}


def _like_if_shaped(parameter: Tensor, value: Tensor) -> Tensor:
    return like(parameter, value) if value.shape == parameter.shape else value


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
