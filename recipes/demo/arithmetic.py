"""The demo's world: sums of three digits from reasoning-gym, a tokenizer for them, and two tiny models."""

from __future__ import annotations

import random
import re
from pathlib import Path

import reasoning_gym
from making import make_tokenizer, write_llama, write_rows
from transformers import PreTrainedTokenizerFast

INSTRUCTION = "State the final answer to the following arithmetic problem:"
PIECES = [INSTRUCTION, " + ", " - ", " = ", " =", "\n", "-", " ", *"0123456789"]
HELD_OUT = 550
SLIP = 0.5  # how often the student's teachers of old were off by one
SLOPPY_COPIES = 4


def write_data(folder: Path) -> None:
    """train.jsonl (right solutions), sloppy.jsonl (careless ones), heldout.jsonl (disjoint problems, answers only)."""
    all_problems = problems()
    heldout, train = all_problems[:HELD_OUT], all_problems[HELD_OUT:]
    rng = random.Random(0)
    sloppy = [(text, solution(text, rng), answer) for _ in range(SLOPPY_COPIES) for text, _, answer in train]
    write_rows(folder / "train.jsonl", ({"prompt": text, "completion": work, "answer": a} for text, work, a in train))
    write_rows(folder / "sloppy.jsonl", ({"prompt": text, "completion": work} for text, work, _ in sloppy))
    write_rows(folder / "heldout.jsonl", ({"prompt": text, "answer": answer} for text, _, answer in heldout))


def write_model(folder: Path, layers: int) -> None:
    """A Llama with random weights, and its tokenizer."""
    write_llama(folder, _tokenizer(), width=96, layers=layers)


def problems() -> list[tuple[str, str, str]]:
    """Every different (question, worked solution, answer) of the task, in the data set's order."""
    drawn = reasoning_gym.create_dataset(
        "chain_sum", size=20_000, seed=1, min_terms=3, max_terms=3, min_digits=1, max_digits=1
    )
    answers = {row["question"]: row["answer"] for row in drawn}
    return [(question, solution(question, None), answer) for question, answer in answers.items()]


def solution(question: str, careless: random.Random | None) -> str:
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
    pattern = re.escape(INSTRUCTION).replace("\\ ", " ") + r"| [-+=] | =|\n|-| |[0-9]"
    return make_tokenizer(PIECES, pattern, additional_special_tokens=["<|user|>", "<|assistant|>"])
