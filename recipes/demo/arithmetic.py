"""The demo's world: sums of three digits from reasoning-gym, a tokenizer for them, and two tiny models."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

INSTRUCTION = "State the final answer to the following arithmetic problem:"
SPECIALS = ["<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
PIECES = [INSTRUCTION, " + ", " - ", " = ", " =", "\n", "-", " ", *"0123456789"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELD_OUT = 550
SLIP = 0.5  # how often the student's teachers of old were off by one
SLOPPY_COPIES = 4


def write_data(folder: Path) -> None:
    """train.jsonl (right solutions), sloppy.jsonl (careless ones), heldout.jsonl (disjoint problems, answers only)."""
    problems = _problems()
    heldout, train = problems[:HELD_OUT], problems[HELD_OUT:]
    rng = random.Random(0)
    sloppy = [(text, _solution(text, rng), answer) for _ in range(SLOPPY_COPIES) for text, _, answer in train]
    _write(folder / "train.jsonl", ({"prompt": text, "completion": work, "answer": a} for text, work, a in train))
    _write(folder / "sloppy.jsonl", ({"prompt": text, "completion": work} for text, work, _ in sloppy))
    _write(folder / "heldout.jsonl", ({"prompt": text, "answer": answer} for text, _, answer in heldout))


def write_model(folder: Path, layers: int) -> None:
    """A Llama with random weights, and its tokenizer."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _problems() -> list[tuple[str, str, str]]:
    """Every different (question, worked solution, answer) of the task, in the data set's order."""
    drawn = reasoning_gym.create_dataset(
        "chain_sum", size=20_000, seed=1, min_terms=3, max_terms=3, min_digits=1, max_digits=1
    )
    problems = {row["question"]: row["answer"] for row in drawn}
    return [(question, _solution(question, None), answer) for question, answer in problems.items()]


def _solution(question: str, careless: random.Random | None) -> str:
    """The running totals, one a line: "4 - 1 = 3", "3 - 7 = -4". A careless solver is one too high now and then."""
    expression = question.removeprefix(INSTRUCTION).removesuffix("=").split()
    total, lines = int(expression[0]), []
    for sign, term in zip(expression[1::2], expression[2::2], strict=True):
        slip = int(careless is not None and careless.random() < SLIP)
        new = total + (int(term) if sign == "+" else -int(term)) + slip
        lines.append(f"{total} {sign} {term} = {new}")
        total = new
    return "\n".join(lines)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for the instruction, one per digit, sign and role."""
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(SPECIALS + PIECES)}, unk_token="<|unk|>"))
    pattern = re.escape(INSTRUCTION).replace("\\ ", " ") + r"| [-+=] | =|\n|-| |[0-9]"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
