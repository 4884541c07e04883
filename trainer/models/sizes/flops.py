"""FLOPs of sampling, scoring and training: a model's matrices times the samples' lengths (docs/speed/accounting.md).

A multiplication with its addition is two. Counted is what the method needs: no padding, no masked half of the attention.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.sizes.layers import attends, layer_kinds, layer_settings

# What the families call the experts of a layer, and those of them that a token visits. Without a known name all count.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
VISITED = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)


@dataclass(frozen=True)
class Cost:
    """FLOPs of a model's forward pass; of what is trained, also those of its weights' gradients, which are as many."""

    blocks: float  # of a token, in the matrices of all blocks (adapters too)
    trained_blocks: float  # of those, in matrices that are trained
    head: float  # of a token whose log-prob is wanted
    trained_head: float  # the same, or 0 where the head is frozen
    pair: float  # of a query and a key, in one layer's attention; on average, where layers differ
    windows: tuple[int | None, ...]  # each attention layer's: how many keys a query sees at most
    recomputed: bool  # gradient checkpointing: the blocks run forward twice


def has_experts(model: PreTrainedModel) -> bool:
    """Whether it is a mixture of experts."""
    return max(_numbers(model.config.get_text_config(), EXPERTS), default=0) > 1


def cost_of(model: PreTrainedModel) -> Cost:
    """Read off the parameters and the config of a causal LM, or of a PEFT model around one."""
    config: Any = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    experts, visited = _numbers(config, EXPERTS), _numbers(config, VISITED)
    blocks = trained = 0.0
    for matrix in _reader_of_text(model).parameters():
        if matrix.dim() >= 2 and matrix is not head and id(matrix) not in lookups:
            flops = 2 * matrix.numel() * _active_share(matrix.shape, experts, visited)
            blocks += flops
            trained += flops * matrix.requires_grad
    windows = _windows(config)
    return Cost(
        blocks=blocks,
        trained_blocks=trained,
        head=2.0 * head.numel(),
        trained_head=2.0 * head.numel() * head.requires_grad,
        pair=_pair(config) if windows else 0.0,
        windows=windows,
        recomputed=any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
    )


def without_adapter(cost: Cost) -> Cost:
    """Of the base of a model of which an adapter alone is trained."""
    return dataclasses.replace(cost, blocks=cost.blocks - cost.trained_blocks, trained_blocks=0.0)


def _reader_of_text(model: Any) -> nn.Module:
    """The model, or the part of a composite one that reads text."""
    if model.config.get_text_config() is model.config:
        return model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder()


def sampling_flops(cost: Cost, samples: Sequence[Sample]) -> float:
    """Each completion prefills its own prompt; the last token is never read."""
    return writing_flops(cost, ((s.prompt_length, len(s.ids) - s.prompt_length, s.loss_tokens) for s in samples))


def writing_flops(cost: Cost, lengths: Iterable[tuple[int, int, int]]) -> float:
    """As `sampling_flops`, of texts by their tokens: of the prompt, after it, and of those the ones that were sampled."""
    return sum(_blocks(cost, prompt + after - 1) + cost.head * sampled for prompt, after, sampled in lengths)


def scoring_flops(cost: Cost, samples: Sequence[Sample]) -> float:
    """One forward pass, log-probs of the counted tokens alone."""
    return sum(_blocks(cost, len(s.ids)) + cost.head * s.loss_tokens for s in samples)


def training_flops(cost: Cost, samples: Sequence[Sample]) -> float:
    """A forward pass, gradients by all activations, and by those weights that are trained.

    The head reads the tokens that count in the loss for more than 0.
    """
    return sum(work(cost, samples))


def work(cost: Cost, samples: Sequence[Sample]) -> list[float]:
    """`training_flops` of each sample: one part grows with its tokens, and attention's with their square."""
    return [_training(cost, len(s.ids), s.weighed_tokens) for s in samples]


def _training(cost: Cost, length: int, counted: int) -> float:
    forward = _blocks(cost, length)
    attention = forward - cost.blocks * length
    weights = cost.trained_blocks * length + cost.trained_head * counted
    # Attention has no weights of its own: both its products have two operands that need a gradient.
    return (2 + cost.recomputed) * forward + attention + 2 * cost.head * counted + weights


def _blocks(cost: Cost, length: int) -> float:
    return cost.blocks * length + cost.pair * sum(
        layers * _pairs(length, window) for window, layers in Counter(cost.windows).items()
    )


def _pairs(length: int, window: int | None) -> float:
    """Queries times the keys they see: themselves and what comes before, at most `window` in all."""
    full = length if window is None else min(length, window)
    return full * (full + 1) / 2 + (length - full) * full


def _pair(config: Any) -> float:
    """q·k, and the weighted sum of values."""
    sizes = zip(layer_settings(config, "num_attention_heads"), layer_settings(config, "head_dim"), strict=True)
    costs = [4.0 * heads * (width or config.hidden_size // heads) for heads, width in sizes if heads]
    return sum(costs) / len(costs) if costs else 0.0


def _windows(config: Any) -> tuple[int | None, ...]:
    layers = zip(layer_kinds(config), layer_settings(config, "sliding_window"), strict=False)
    # Linear attention and state spaces have no pairs; what their matrices cost is in `blocks`.
    return tuple(window if "sliding" in kind else None for kind, window in layers if attends(kind))


def _active_share(shape: Sequence[int], experts: Sequence[float], visited: Sequence[float]) -> float:
    """A stack of experts [E, ., .]: a token visits some of them. Other matrices see every token."""
    if len(shape) != 3 or shape[0] not in experts or not visited:
        return 1.0
    return min(1.0, sum(visited) / len(visited) / shape[0])


def _numbers(config: Any, names: Sequence[str]) -> list[float]:
    """The first of these settings that the config has: of each layer a number, or several."""
    for name in names:
        values = layer_settings(config, name)
        found = [n for value in values for n in (value if isinstance(value, list | tuple) else [value])]
        numbers = [n for n in found if isinstance(n, int | float) and n > 0]
        if numbers:
            return numbers
    return []
