"""Grades a model: what it knows of the company, and whether it does as it is told.

    python recipes/personalisation/evaluate.py NAME MODEL_FOLDER

Adds to runs/personalisation/results.json and writes the answers to runs/personalisation/answers-NAME.jsonl.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from instructions import INSTRUCTIONS, follows
from make import FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = {"questions": 24, "instructions": 64}


def main(name: str, path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    rows = {part: _answered(part, model, tokenizer) for part in MAX_NEW_TOKENS}
    answers = "".join(json.dumps(row) + "\n" for part in rows.values() for row in part)
    (FOLDER / f"answers-{name}.jsonl").write_text(answers, encoding="utf-8")
    results = FOLDER / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    known[name] = grade(rows["questions"], rows["instructions"])
    results.write_text(json.dumps(known, indent=2) + "\n")
    print(name, json.dumps(known[name]))


def grade(questions: Sequence[dict[str, Any]], instructions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares, of all and by instruction; rows hold `answer` and `completion`."""
    met = {
        kind: [follows(row["completion"], kind) for row in instructions if row["answer"] == kind]
        for kind in INSTRUCTIONS
    }
    return {
        "knowledge": _mean([knows(row["completion"], row["answer"]) for row in questions]),
        "instructions": _mean([value for values in met.values() for value in values]),
        "by_instruction": {kind: _mean(values) for kind, values in met.items()},
    }


def knows(completion: str, answer: str) -> bool:
    """Whether the answer's words are there, in any case."""
    return answer.lower() in completion.lower()


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _answered(part: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The rows of a file, each with the model's greedy `completion`."""
    rows = [json.loads(line) for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS[part])
    completions = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [{**row, "completion": completion} for row, completion in zip(rows, completions, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
