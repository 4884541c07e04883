"""A pair of models made up on the spot: a random Llama, the same with noise on its weights, prompts of random words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

SPREAD = 6.0  # scale of the last norm: next-token distributions of a few nats
NOISE = 0.2  # between student and teacher, relative to the weights


class Size(NamedTuple):
    """The generated pair."""

    vocabulary: int
    hidden: int
    layers: int


def make_pair(folder: Path, size: Size) -> None:
    """Writes teacher/, student/ and prompts.jsonl into the folder."""
    tokenizer = word_tokenizer(size.vocabulary)
    torch.manual_seed(0)
    model = _llama(size)
    for name in ("teacher", "student"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=NOISE * float(parameter.std(correction=0)))
    rng = random.Random(0)
    texts = (" ".join(f"w{rng.randrange(size.vocabulary - 2)}" for _ in range(rng.randint(8, 32))) for _ in range(1000))
    lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
    (folder / "prompts.jsonl").write_text("".join(lines))


def _llama(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = size.hidden // 64
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(SPREAD)
    return model


def word_tokenizer(vocabulary: int) -> Any:
    """One token a word: w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unk>", *(f"w{index}" for index in range(vocabulary - 2))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>", pad_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer
