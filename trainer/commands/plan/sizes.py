"""What a run will hold in memory, of models that are not loaded (docs/speed/accounting.md). All sizes are bytes.

A model is an outline: the real module on the meta device, where tensors have shapes and dtypes and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import PreTrainedModel

from fastkl.kernels.chunking import LEAST_ROWS, LONG_PRODUCT_ROWS, WORKSPACE_BYTES
from fastkl.trainer.data.batching import Layout
from fastkl.trainer.models.modes import Dropout, updating
from fastkl.trainer.models.sizes.layers import attends, layer_kinds, layer_settings
from fastkl.trainer.rollouts.samplers.in_progress import InProgress

QUANTIZED = {"8bit": 1.0, "4bit": 0.5}  # bytes of a weight of the blocks


class Shape(NamedTuple):
    """A forward pass."""

    rows: int
    width: int  # tokens of a row
    counted: int  # tokens with a log-prob


def weights(model: nn.Module, quantization: str | None = None) -> float:
    """Of parameters and buffers; a quantised teacher's matrices, but not its head and embeddings, take fewer bytes."""
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    apart.add(id(model.get_output_embeddings().weight))  # type: ignore[operator]
    size = 0.0
    for tensor in _distinct([*model.parameters(), *model.buffers()]):
        small = quantization is not None and tensor.dim() >= 2 and id(tensor) not in apart
        size += tensor.numel() * (QUANTIZED[str(quantization)] if small else tensor.element_size())
    return size


def gradients(model: nn.Module) -> float:
    """One number for each trained one, in the same dtype; Adam keeps two more."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return float(sum(parameter.numel() * parameter.element_size() for parameter in _distinct(trained)))


def second_weights(student: nn.Module, averaged: bool, sharded: bool) -> float:
    """Of a teacher that follows the student: of what is trained once more, an average in float32.

    An average of 16 bits' weights stands beside them as the model reads them. Shards are gathered only to score.
    """
    size = 0.0
    for tensor in _distinct([parameter for parameter in student.parameters() if parameter.requires_grad]):
        own = tensor.element_size()
        held = max(own, torch.float32.itemsize) if averaged else own
        size += tensor.numel() * (held + (own if held != own and not sharded else 0))
    return size


@lru_cache(maxsize=64)
def activations(
    model: PreTrainedModel, shape: Shape, layout: Layout, autocast: torch.dtype | None, dropout: Dropout
) -> float | None:
    """What the blocks keep for the backward pass, and what the head's loss leaves; None where the forward cannot be traced.

    Of autocast, the copies of the weights count too: they are kept for as long.
    """
    blocks = _kept(model, shape, layout, autocast, dropout)
    return None if blocks is None else blocks + shape.counted * model.get_output_embeddings().weight.shape[1] * 4.0


@lru_cache(maxsize=64)
def activations_of_layer(
    model: PreTrainedModel, shape: Shape, layout: Layout, autocast: torch.dtype | None, dropout: Dropout
) -> float | None:
    """What one of the blocks keeps where gradient checkpointing has it computed again; of all, an average."""
    with _without_checkpointing(model):
        blocks = _kept(model, shape, layout, autocast, dropout)
    layers: int = model.config.get_text_config().num_hidden_layers
    return None if blocks is None else blocks / layers


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _kept(
    model: PreTrainedModel, shape: Shape, layout: Layout, autocast: torch.dtype | None, dropout: Dropout
) -> float | None:
    """What autograd keeps of a forward pass up to the head."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage's address is its name only as long as it lives
    with FakeTensorMode():
        state = {name: _like(tensor) for name, tensor in _tensors(model)}
        inputs = _inputs(shape)
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        if layout == "packed" or shape.rows == 1:  # nothing to mask but what comes later
            own.add(inputs["attention_mask"].untyped_storage()._cdata)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                alive.append(tensor)
                kept[storage._cdata] = storage.nbytes()
            return tensor

        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        try:
            with (
                updating(model, dropout),
                saved,
                torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
            ):
                _to_the_head(model, state, inputs)
        except Exception:  # a forward that looks at values, or a kernel that this machine has not
            return None
    return float(sum(kept.values()))


def head_products(model: PreTrainedModel, autocast: torch.dtype | None) -> float:
    """The gradient of the head, which its loss hands to autograd as a whole, and its weights as autocast rounds them."""
    weight = model.get_output_embeddings().weight
    gradient = weight.numel() * weight.element_size() if weight.requires_grad else 0
    return float(gradient + (0 if autocast is None else weight.numel() * autocast.itemsize))


def head_workspace(
    model: PreTrainedModel, counted: int, on_cpu: bool, heads: int, products: torch.dtype | None = None
) -> float:
    """The logits of a chunk, in float32, and the 16-bit gradients of several where a GPU updates the head.

    `products`: the dtype that the head of a student is multiplied in.
    """
    kind, weight = "cpu" if on_cpu else "accelerator", model.get_output_embeddings().weight
    chunk = max(WORKSPACE_BYTES[kind], LEAST_ROWS[kind] * weight.shape[0] * 4 * heads)
    size = float(min(chunk, counted * weight.shape[0] * 4 * heads))
    if weight.requires_grad and kind == "accelerator" and products in (torch.bfloat16, torch.float16):
        size += min(counted, LONG_PRODUCT_ROWS) * weight.shape[0] * 2
    return size


def cache(model: PreTrainedModel, busy: InProgress, width: int, itemsize: int) -> float:
    """Keys and values of completions in progress, each of so many tokens.

    `generate` keeps no more of a layer with a window than that. Pages have room for all tokens in every layer.
    """
    if busy.paged:
        return _every_layer(model) * busy.tokens * itemsize
    return keys(model, width) * busy.completions * itemsize


def keys(model: PreTrainedModel, width: float) -> float:
    """Numbers in the keys and values of a text of so many tokens."""
    config: Any = model.config.get_text_config()
    windows = layer_settings(config, "sliding_window")
    total = 0.0
    for kind, heads, size, window in zip(layer_kinds(config), *_heads(config), windows, strict=True):
        tokens = min(width, window) if "sliding" in kind and window else width
        total += 2.0 * heads * size * tokens if attends(kind) else 0.0
    return total


def _every_layer(model: PreTrainedModel) -> float:
    """Numbers in the keys and values of one token, where no window counts."""
    config: Any = model.config.get_text_config()
    return sum(
        2.0 * heads * size
        for kind, heads, size in zip(layer_kinds(config), *_heads(config), strict=True)
        if attends(kind)
    )


def paged_attention(model: PreTrainedModel, busy: InProgress, width: int, itemsize: int) -> Iterator[tuple[str, float]]:
    """What continuous batching needs beside its pages, by name: a layer's keys as it reads them, and a mask.

    Flash attention needs no mask, and reads keys as they are; others repeat them for all heads.
    """
    if not busy.paged:
        return
    config: Any = model.config.get_text_config()
    flash = "flash" in str(model.config._attn_implementation)
    queries = layer_settings(config, "num_attention_heads")
    heads = zip(queries, *_heads(config), strict=True)
    a_token = max(((2 * own if flash else 2 * all_ + own) * size for all_, own, size in heads), default=0)
    yield "keys and values of a layer, as it reads them", float(a_token * busy.completions * width * itemsize)
    if not flash:
        masks = len({"sliding" in kind for kind in layer_kinds(config) if attends(kind)})
        yield "the attention's mask", masks * itemsize * float(busy.batch_tokens) * (busy.tokens + busy.batch_tokens)


def _heads(config: Any) -> tuple[list[int], list[int]]:
    """Of each layer: heads of keys, and the width of one."""
    heads = [own or config.num_attention_heads for own in layer_settings(config, "num_key_value_heads")]
    widths = [own or config.hidden_size // config.num_attention_heads for own in layer_settings(config, "head_dim")]
    return heads, widths


class Unit(NamedTuple):
    """What FSDP gathers at once, in bytes."""

    weights: float
    trained: float  # of them, what has a gradient


def units(model: PreTrainedModel) -> tuple[Unit, Unit]:
    """The largest layer, and what is in none: embeddings, the last norm, the head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {*(base._no_split_modules or [])}
    layers = [module for module in model.modules() if type(module).__name__ in names]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    found = [_unit(list(layer.parameters())) for layer in layers]
    return max(found, default=Unit(0.0, 0.0)), _unit(rest)


def _unit(parameters: list[nn.Parameter]) -> Unit:
    own = _distinct(parameters)
    sizes = [(float(each.numel() * each.element_size()), each.requires_grad) for each in own]
    return Unit(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


class _AtTheHead(Exception):
    """The blocks are done."""


def _inputs(shape: Shape) -> dict[str, Tensor]:
    """A padded batch. With a mask of this shape nothing looks at values, of which there are none."""
    positions = torch.arange(shape.width).expand(shape.rows, shape.width)
    mask = torch.ones(shape.rows, 1, shape.width, shape.width, dtype=torch.bool)
    return {"input_ids": torch.zeros_like(positions), "position_ids": positions, "attention_mask": mask}


def _to_the_head(model: PreTrainedModel, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """A forward pass up to the LM head."""

    def stop(module: nn.Module, inputs: Any) -> None:
        raise _AtTheHead

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        functional_call(model, state, kwargs={**inputs, "use_cache": False})
    except _AtTheHead:
        pass
    finally:
        hook.remove()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _like(tensor: Tensor) -> Tensor:
    """The same on the CPU, under FakeTensorMode."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)


def _distinct(tensors: list[Any]) -> list[Any]:
    """Tied ones once."""
    return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())
