"""What kinds of layers a model has, and how long a text may be, by its config."""

from __future__ import annotations

from typing import Any


def layer_kinds(config: Any) -> list[str]:
    """One name per layer, as Transformers gives them: full_attention, sliding_attention, linear_attention, conv, …"""
    windows = layer_settings(config, "sliding_window")
    usual = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return list(getattr(config, "layer_types", None) or usual)


def layer_settings(config: Any, name: str) -> list[Any]:
    """A setting of each layer, None where it is unknown: layers differ in some models, as Gemma 4's do in head_dim."""
    differ = getattr(config, "is_heterogeneous", False)
    layers = config.per_layer_config if differ else [config] * config.num_hidden_layers
    return [getattr(layer, name, None) for layer in layers]


def attends(kind: str) -> bool:
    """Whether such a layer compares queries with keys, rather than carrying a state from token to token."""
    return kind.endswith("_attention") and kind != "linear_attention"


def most_positions(config: Any) -> int | None:
    """How many tokens a text may have; None where nothing limits it, which some configs write as −1."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def rope_switch(config: Any) -> int | None:
    """LongRoPE: a batch with more positions than this is rotated by other frequencies, all of it; None: never."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [
        found,
        *(value for value in found.values() if isinstance(value, dict)),
    ]  # one, or one for each kind of layer
    switches = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((switch for switch in switches if switch), default=None)
