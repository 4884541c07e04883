"""What a model knows of the company, and whether it does as it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from company import SETS
from instructions import follows
from series import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkl.trainer.runs.files import read_jsonl

Row = dict[str, Any]
ANSWER, CHAT = 24, 48  # tokens at most, to a question and to an instruction


class Answer(NamedTuple):
    """A text, and whether the model ended it itself."""

    text: str
    ended: bool


class Model:
    """A saved student, or the model as it was. It answers in bfloat16."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def answers(self, prompts: Sequence[str], max_new_tokens: int, *, sampled: bool = False) -> list[Answer]:
        """The likeliest tokens, or at temperature 1 `sampled` from all of them."""
        inputs = self.tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} if sampled else {"do_sample": False}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **how, max_new_tokens=max_new_tokens)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = (new == self.tokenizer.eos_token_id).any(dim=1).tolist()
        return [Answer(*pair) for pair in zip(texts, ended, strict=True)]


def grade(path: Path, data: Path, folder: Path) -> Row:
    """Shares of questions answered and of instructions met. `data` holds the prompts; the answers go into `folder`."""
    model = Model(path)
    known = {name: graded(model, read_jsonl(data / f"graded-{name}.jsonl"), ANSWER, knows) for name in SETS}
    told = graded(model, read_jsonl(data / "instructions.jsonl"), CHAT, follows)
    write_rows(folder / "answers.jsonl", [row for rows in (*known.values(), told) for row in rows])
    return {"knows": {name: share(rows) for name, rows in known.items()}, **shares_by_kind(told)}


def reads(path: Path, data: Path, template: str) -> float:
    """The share of the first set's questions that the model answers when it has read the document, as a teacher does."""
    asked = [{**row, "prompt": template.format(**row)} for row in read_jsonl(data / "graded-first.jsonl")]
    return share(graded(Model(path), asked, ANSWER, knows))


def graded(model: Model, rows: list[Row], max_new_tokens: int, does: Callable[[str, str], bool]) -> list[Row]:
    """The rows, each with the model's greedy `completion` and whether it does what the row's `answer` names."""
    answers = model.answers([row["prompt"] for row in rows], max_new_tokens)
    return [
        {**row, "completion": answer.text, "does": does(answer.text, row["answer"])}
        for row, answer in zip(rows, answers, strict=True)
    ]


def shares_by_kind(rows: Sequence[Row]) -> Row:
    kinds = dict.fromkeys(row["answer"] for row in rows)
    by_kind = {kind: share([row for row in rows if row["answer"] == kind]) for kind in kinds}
    words = fmean(len(row["completion"].split()) for row in rows)
    return {"follows": share(rows), "follows_by_kind": by_kind, "words": words}


def share(rows: Iterable[Row]) -> float:
    return fmean(row["does"] for row in rows)


def knows(completion: str, answer: str) -> bool:
    """Whether the answer's words are there, in any case."""
    return answer.lower() in completion.lower()
