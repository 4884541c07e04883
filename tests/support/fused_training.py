"""A few steps of training with a fused head: in one process, and as one of several that learn together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import causal_lm
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastkl.head import fuse
from fastkl.loss import linear_logprobs, policy_gradient_loss

STEPS, RATE = 3, 0.05
IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
TOKENS = IDS[:, 1:].numel()


def model_of(kind: str) -> Any:
    """`full`, with an untied head; `lora`, with peft before or after."""
    model = causal_lm("qwen3", tie_word_embeddings=False)
    if kind == "full":
        return fuse(model)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    if kind == "lora-of-fused":
        return get_peft_model(fuse(model), settings)
    return fuse(get_peft_model(model, settings))


def _sharded(model: Any, *, head: bool) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for part in [*base.model.layers, *([base.lm_head] if head else [])]:
        fully_shard(part)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "ddp": DistributedDataParallel,
    "ddp-unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "fsdp2": lambda model: _sharded(model, head=False),
    "fsdp2-head": lambda model: _sharded(model, head=True),
    "fsdp1": lambda model: FullyShardedDataParallel(model, use_orig_params=True),
}


def loss_of(model: nn.Module, ids: Tensor, form: str) -> Tensor:
    """The sum over the tokens, divided by those of the whole batch. `form`: what the function returns."""

    def output(hidden: Tensor, weight: Tensor, **head: Any) -> Any:
        options = {**head, "normalizer": TOKENS}
        if form == "tensor":  # from log-probs: the head's weight is needed again in the backward pass
            return -linear_logprobs(hidden[:, :-1], weight, ids[:, 1:], **head).sum() / TOKENS
        found = policy_gradient_loss(hidden[:, :-1], weight, ids[:, 1:], torch.ones(ids[:, 1:].shape), **options)
        return {"output": found, "tuple": (found.loss, "said"), "dict": {"loss": found.loss}}[form]

    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), fused=output)
    loss: Tensor = found if form == "tensor" else found["loss"] if form == "dict" else found[0]
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
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {
                name.removeprefix("_fsdp_wrapped_module."): p.detach().clone() for name, p in model.named_parameters()
            }
    found = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in found.items()}


def in_one_process(kind: str) -> dict[str, Tensor]:
    model = model_of(kind)
    return trained(model, lambda: plain_loss(model, IDS))


def as_one_of_several(rank: int, count: int, kind: str, wrapper: str, form: str) -> dict[str, Tensor]:
    model = WRAPPERS[wrapper](model_of(kind))
    return trained(model, lambda: count * loss_of(model, IDS[rank::count], form))
