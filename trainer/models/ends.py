"""Which token ids end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from fastkl.trainer.data.chat import end_of_turn
from fastkl.trainer.errors import ConfigError


def declared_ends(model: PreTrainedModel) -> list[int]:
    """The ids that end a completion by the model's generation config."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = declared if isinstance(declared, list) else [declared]
    return [token for token in ids if token is not None]


def check_declared_ends(path: str, vocabulary: int) -> None:
    """The generation config in a model's folder, if it has one, is JSON, and the ends it declares are ids of the model.

    Raises:
        ConfigError: Otherwise. Transformers would ignore a file that is no JSON, and compare ids with whatever it says.
    """
    file = Path(path, GENERATION_CONFIG_NAME)
    if not file.is_file():
        return
    try:
        declared = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); download it again, or delete it") from error
    if not isinstance(declared, dict):
        raise ConfigError(f"{file} is no JSON object but {str(declared)[:40]!r}; download it again, or delete it")
    ends = declared.get("eos_token_id")
    wrong = [end for end in (ends if isinstance(ends, list) else [ends]) if not _is_id(end, vocabulary)]
    if ends is not None and wrong:
        raise ConfigError(
            f"{file} has eos_token_id {json.dumps(ends)[:80]}, but {json.dumps(wrong[0])[:40]} is no id below "
            f"{vocabulary}, the model's vocabulary; write a token's id, a list of ids, or null"
        )


def _is_id(value: Any, vocabulary: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary


def end_of_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the model's own, the tokenizer's, and what ends a turn of its chats."""
    return sorted({*declared_ends(model), *tokenizer_ends(tokenizer)})


def tokenizer_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end of sequence, and what ends the assistant's turn in its chat template."""
    return [token for token in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if token is not None]
