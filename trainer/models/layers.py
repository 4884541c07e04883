"""What kinds of layers a model has, by its config."""

from __future__ import annotations

from typing import Any


def layer_kinds(config: Any) -> list[str]:
    """One name per layer, as Transformers gives them: full_attention, sliding_attention, linear_attention, conv, …"""
    usual = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return list(getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers)


def attends(kind: str) -> bool:
    """Whether such a layer compares queries with keys, rather than carrying a state from token to token."""
    return kind.endswith("_attention") and kind != "linear_attention"
