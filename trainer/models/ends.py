"""Which token ids end a completion."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def declared_ends(model: PreTrainedModel) -> list[int]:
    """The ids that end a completion by the model's generation config."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return [token for token in ids if token is not None]


def end_of_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the model's own and the tokenizer's."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*declared_ends(model), *own})
