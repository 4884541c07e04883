"""The fused head: a Transformers causal LM whose last step is a fastkl loss instead of a matrix of logits.

    model = fuse(model)                                  # any Transformers causal LM, or a peft model around one
    output = model(input_ids=ids, attention_mask=attention_mask,
        fused=lambda hidden, weight, **head:                # hidden [B, T, D], as the LM head receives them
            policy_gradient_loss(hidden[:, :-1], weight, ids[:, 1:], advantages, old_logprobs, **head))
    output.loss.backward()

The model's own forward runs, from embeddings to head; only the head module's `forward` is another one for the length of
the call. The weight is touched inside the head module alone, where the hooks of DDP, FSDP2, ZeRO and peft expect it. The
model keeps its class, its weights and their names: it trains, generates and saves as the ordinary model it is.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from fastkl._head.call import place_of_forward
from fastkl._head.forward import BoundForward, FusedForward, is_fused
from fastkl._head.model import causal_lm, first_not_finite

__all__ = ["first_not_finite", "fuse"]

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """The same model, whose forward takes one more keyword, `fused`: a function of the hidden states and the head.

    `model(…, fused=function)` returns `function(hidden, weight, bias=…, logit_scale=…, softcap=…)`, and computes no
    logits. `hidden` [B, T, D] is what the head receives. `weight` [V, D] and `bias` [V] or None are the head's. The others
    say what the model does to its logits (floats; `softcap` may be None). Losses of fastkl.loss take them by these names.
    The other inputs are the model's, without `labels`; `use_cache` is off. Without `fused` nothing is different.

    Fuse first, then wrap: `DistributedDataParallel(fuse(model))`, `fully_shard(fuse(model))`, `torch.compile(fuse(model))`,
    `Trainer(model=fuse(model))`. The wrapper passes `fused` on, and synchronises gradients as ever. peft may come before or
    after. A model that is fused already stays as it is.

    Args:
        model: A causal LM of Transformers, or a peft model around one. It is run on one token, to see what becomes of its
            logits.

    Raises:
        TypeError: For what is no causal LM (a model without its head, one with an encoder), a wrapped model (DDP, FSDP,
            torch.compile, DeepSpeed), and where the head is no plain `nn.Linear` (a LoRA adapter on it, a quantised one).
        ValueError: Where the model treats its logits in a way that fastkl.loss does not know, or where its hidden states
            are not finite.

    A call with `fused` raises TypeError for a function that does not take what it is called with, and RuntimeError where
    the model runs its head more or less than once.
    """
    base: Any = causal_lm(model)
    if is_fused(base):
        return model
    if "_original_forward" in vars(base):  # where accelerate keeps the forward that it casts around
        raise TypeError(
            f"{type(base).__name__} has been prepared by accelerate for mixed precision; fuse first, then prepare: "
            f"accelerator.prepare(fuse(model))"
        )
    place = place_of_forward(base)
    forward = vars(base)[place] = BoundForward(FusedForward(base, vars(base).get(place)), base)
    vars(base)["_replicate_for_data_parallel"] = forward.replicate
    return model
