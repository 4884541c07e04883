"""Tiny models and tokenizers: real Transformers objects, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHARACTERS = "0123456789+-=abcdefghijklmnopqrstuvwxyz .?!"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer(characters: str = CHARACTERS, pairs_of: str = "", **special: str) -> PreTrainedTokenizerFast:
    """One token per character, an end token and three roles; two of `pairs_of` that stand together are one token."""
    pairs = [a + b for a in pairs_of for b in pairs_of]
    words = ["<eos>", "<unk>", "<u>", "<s>", "<a>", *characters, *pairs]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    pair = f"[{pairs_of}]{{2}}|" if pairs_of else ""
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"<eos>|<u>|<s>|<a>|{pair}."), "isolated")
    core.decoder = decoders.Fuse()
    names = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<eos>", **special}
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def llama(vocabulary: int, *, layers: int = 1, width: int = 16, seed: int = 0, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    values = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(values | settings)))


def causal_lm(kind: str = "llama", attention: str = "sdpa", seed: int = 0, **settings: object) -> PreTrainedModel:
    """A random model of a family, with weights large enough that its distributions are far from flat."""
    torch.manual_seed(seed)
    values: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind in ("qwen3", "gemma2", "gemma3_text"):
        values["head_dim"] = 16
    if kind in ("gemma2", "gemma3_text", "mistral"):
        values["sliding_window"] = 8
    if kind == "gemma3_text":
        values["layer_types"] = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(kind, **(values | settings))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def save_model(folder: Path, words: PreTrainedTokenizerFast | None = None, **settings: Any) -> Path:
    """A model folder with its tokenizer. `vocabulary` pads the head beyond the tokenizer's ids."""
    words = tokenizer() if words is None else words
    llama(settings.pop("vocabulary", len(words)), **settings).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
