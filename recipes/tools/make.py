"""Data and untrained models of the tools recipe: products of two numbers, with a calculator at hand.

The teacher's completions ask the calculator. The student's mostly guess; some ask it, and half of those mistype a digit.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PIECES = ["<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>", "<calc>", "</calc>", " = ", *"0123456789*="]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELD_OUT = 500
ASKS = 0.25  # of the student's completions
COPIES = 3


def make(folder: Path) -> None:
    rng = random.Random(0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    heldout, train = pairs[:HELD_OUT], pairs[HELD_OUT:]
    _write(folder / "heldout.jsonl", ({"prompt": f"{a}*{b}=", "answer": str(a * b)} for a, b in heldout))
    _write(folder / "careful.jsonl", ({"prompt": f"{a}*{b}=", "completion": _asked(a, b)} for a, b in train))
    careless = [(a, b, _careless(a, b, rng)) for _ in range(COPIES) for a, b in train]
    _write(folder / "careless.jsonl", ({"prompt": f"{a}*{b}=", "completion": text} for a, b, text in careless))
    for name in ("teacher", "student"):
        _write_model(folder / name)


def _careless(a: int, b: int, rng: random.Random) -> str:
    if rng.random() > ASKS:
        return str(rng.randrange(100, 10_000))
    return _asked(a + rng.randrange(1, 10) if rng.random() < 0.5 else a, b)


def _asked(a: int, b: int) -> str:
    """What stands in a conversation: the question to the calculator, and its answer."""
    return f"<calc>{a}*{b}</calc> = {a * b}"


def _write_model(folder: Path) -> None:
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^>]*>| = |."), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(PIECES),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
