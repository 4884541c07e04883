"""A few steps of training with a fused head: in one process, and as one of several that learn together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_models import causal_lm
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import CausalLMOutput

from fastkl.head import fuse
from fastkl.loss import linear_logprobs, policy_gradient_loss
from fastkl.trainer.models.sharding import head_gathered_once

STEPS, RATE = 3, 0.05
CHECKPOINTING = "-checkpointing"
IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
TOKENS = IDS[:, 1:].numel()


def lora(model: Any, **options: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**(settings | options)))


def model_of(kind: str, layers: int = 2) -> Any:
    """Trained in full, with a head of its own; or `lora`, with peft before or after."""
    model: Any = causal_lm("qwen3", tie_word_embeddings=False, num_hidden_layers=layers).train()
    if kind.endswith(CHECKPOINTING):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    kind = kind.removesuffix(CHECKPOINTING)
    return fuse(model) if kind == "full" else lora(fuse(model)) if kind == "lora-of-fused" else fuse(lora(model))


def _sharded(model: Any, *, head: bool = False, **options: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for part in [*base.model.layers, *([base.lm_head] if head else [])]:
        fully_shard(part, **options)
    return fully_shard(model, **options)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "ddp": DistributedDataParallel,
    "ddp-unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "ddp-static": lambda model: DistributedDataParallel(model, static_graph=True),
    "fsdp2": _sharded,
    "fsdp2-head": lambda model: _sharded(model, head=True),
    "fsdp2-cast": lambda model: _sharded(
        model, head=True, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float32)
    ),
}


@dataclass
class Result:
    loss: Tensor


def loss_of(model: nn.Module, ids: Tensor, form: str) -> Tensor:
    """The sum over the tokens, divided by those of the whole batch. `form`: what the function returns."""

    def output(hidden: Tensor, weight: Tensor, **head: Any) -> Any:
        options = {**head, "normalizer": TOKENS}
        if form == "tensor":  # from log-probs: the head's weight is needed again in the backward pass
            return -linear_logprobs(hidden[:, :-1], weight, ids[:, 1:], **head).sum() / TOKENS
        found = policy_gradient_loss(hidden[:, :-1], weight, ids[:, 1:], torch.ones(ids[:, 1:].shape), **options)
        return {
            "output": found,
            "tuple": (found.loss, "said"),
            "dict": {"loss": found.loss},
            "model-output": CausalLMOutput(loss=found.loss),
            "dataclass": Result(found.loss),
        }[form]

    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), fused=output)
    parts = {"tensor": lambda: found, "dict": lambda: found["loss"], "tuple": lambda: found[0]}
    loss: Tensor = parts.get(form, lambda: found.loss)()
    return loss


def plain_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The same, with all the logits."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / TOKENS


def trained(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Whole parameters after the steps, by name."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return whole(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in found.items()}


def in_one_process(kind: str) -> dict[str, Tensor]:
    model = model_of(kind)
    return trained(model, lambda: plain_loss(model, IDS))


def as_one_of_several(rank: int, count: int, kind: str, wrapper: str, form: str) -> dict[str, Tensor]:
    model = WRAPPERS[wrapper](model_of(kind))
    return trained(model, lambda: count * loss_of(model, IDS[rank::count], form))


class Gathered(NamedTuple):
    gathered: int  # bytes
    outer: int  # bytes of all that is in no layer
    gradients: dict[str, Tensor]


def gathered_bytes(rank: int, count: int, kind: str) -> list[Gathered]:
    """What FSDP gathers for 3 batches whose gradients are accumulated and for 2 that are only scored: as it would by
    itself, and inside `head_gathered_once`."""
    return [_gathered_bytes(kind, way) for way in (lambda _: nullcontext(), head_gathered_once)]


def _gathered_bytes(kind: str, way: Callable[[nn.Module], Any]) -> Gathered:
    model = _sharded(model_of(kind), reshard_after_forward=True)
    sizes: list[int] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(dist, name)

    def counted(*args: Any, **options: Any) -> Any:
        found = next(
            tensor for tensor in (*args, *options.values()) if isinstance(tensor, Tensor)
        )  # the whole one is first
        sizes.append(found.numel() * found.itemsize)
        return gather(*args, **options)

    with patch.object(dist, name, counted):
        with way(model):
            for row in IDS[:3]:
                loss_of(model, row[None], "output").backward()
        with way(model), torch.no_grad():
            for row in IDS[:2]:
                loss_of(model, row[None], "tensor")
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    outer = sum(p.numel() * p.itemsize for name, p in model.named_parameters() if ".layers." not in name)
    return Gathered(sum(sizes), outer, gradients)
