"""Which token ids end a completion."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.data.chat import end_of_turn


def declared_ends(model: PreTrainedModel) -> list[int]:
    """The ids that end a completion by the model's generation config."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return [token for token in ids if token is not None]


def end_of_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the model's own, the tokenizer's, and what ends a turn of its chats."""
    return sorted({*declared_ends(model), *tokenizer_ends(tokenizer)})


def tokenizer_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end of sequence, and what ends the assistant's turn in its chat template."""
    return [token for token in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if token is not None]
