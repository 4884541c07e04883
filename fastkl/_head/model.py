"""Which model is fused, and which module its head is: what cannot be fused is refused with the remedy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastkl._loss.heads.operands import is_packed

# Classes that wrap a model for training, or become a part of its class, by name: not all of them are installed.
WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "OptimizedModule",
    "DeepSpeedEngine",
)
HOW = {
    "FSDPModule": "fully_shard(fuse(model))",
    "OptimizedModule": "torch.compile(fuse(model))",
    "DeepSpeedEngine": "deepspeed.initialize(model=fuse(model), …)",
}


def causal_lm(model: Any) -> Any:
    """The causal LM of Transformers that a model is, or that peft has put its layers into."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fuse takes a model, not {type(model).__name__}; load one with AutoModelForCausalLM.from_pretrained"
        )
    _check_not_wrapped(model)
    base = _under_peft(model)
    if base is not model:
        _check_not_wrapped(base)
    name = type(base).__name__
    if not hasattr(base, "get_output_embeddings"):
        raise TypeError(
            f"{name} is no causal LM of Transformers (it has no get_output_embeddings); call a loss of fastkl.loss with "
            f"its hidden states and its head's weight"
        )
    if getattr(base.config, "is_encoder_decoder", False):
        raise TypeError(
            f"{name} has an encoder and a decoder, and fuse takes causal LMs, which are a decoder alone; call a loss of "
            f"fastkl.loss with the decoder's hidden states and the head's weight"
        )
    find_head(base)
    return base


def find_head(model: Any) -> nn.Linear:
    """The module that turns hidden states into logits; a copy that peft trains in full (`modules_to_save`) included."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(
            f"{name} has no LM head; give the model with its head, as AutoModelForCausalLM.from_pretrained loads it"
        )
    if hasattr(head, "modules_to_save"):
        on = head.active_adapters and not head.disable_adapters
        head = head.modules_to_save[head.active_adapters[0]] if on else head.original_module
    if type(head).__module__.partition(".")[0] == "peft":
        raise TypeError(
            f"the LM head of {name} has an adapter on it (peft's {type(head).__name__}) and cannot be fused; leave it out "
            f"of target_modules, target_parameters and trainable_token_indices, tied embeddings included (your own code "
            f"may train it in full, by peft's modules_to_save)"
        )
    what = f"{type(head).__name__} of {type(head).__module__}, not a plain linear layer"
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        weight = head.weight
        if weight.is_floating_point() and not is_packed(weight):
            return head
        what = f"{type(head).__name__} with a packed weight ({type(weight).__name__}, {weight.dtype})"
    raise TypeError(
        f"the LM head of {name} is {what}, and cannot be fused; leave it out of quantisation, and give it a plain nn.Linear"
    )


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the model's first parameter that has a value that is not finite."""
    return next((name for name, weight in model.named_parameters() if not _is_finite(weight)), None)


def _is_finite(weight: Tensor) -> bool:
    return bool(weight.isfinite().all())


def _under_peft(model: Any) -> Any:
    """The model that a peft model, or a tuner of peft, is around."""
    while type(model).__module__.partition(".")[0] == "peft":
        parts = model._modules  # its attributes are those of what it is around, too
        model = parts["base_model"] if "base_model" in parts else parts["model"]
    return model


def _check_not_wrapped(model: nn.Module) -> None:
    name = type(model).__name__
    for part in model.modules():
        found = {kind.__name__ for kind in type(part).__mro__} & {*WRAPPERS}
        if found:
            wrapper = min(found, key=WRAPPERS.index)
            how = HOW.get(wrapper, f"{wrapper}(fuse(model))")
            said = f"{name} has been wrapped" if part is model else f"a part of {name} has been wrapped"
            raise TypeError(f"{said} ({wrapper}) and can no longer be fused; fuse first, then wrap: {how}")
