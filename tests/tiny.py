"""Tiny models, tokenizers and data for the trainer's tests: real Transformers objects, random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-=abcdefghijklmnopqrstuvwxyz .?!"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character, an end token and three roles."""
    words = ["<eos>", "<unk>", "<u>", "<s>", "<a>", *characters]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<eos>|<u>|<s>|<a>|."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def llama(vocabulary: int, *, layers: int = 1, width: int = 16, seed: int = 0, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **{"initializer_range": 0.3, "tie_word_embeddings": True, **settings},
    )
    return LlamaForCausalLM(config)


def save_model(folder: Path, **settings: object) -> Path:
    """A model folder with its tokenizer."""
    words = tokenizer()
    llama(len(words), **settings).save_pretrained(folder)  # type: ignore[arg-type]
    words.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
