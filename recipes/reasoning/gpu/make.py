"""Prepares a reasoning run at full size: prompts of DeepMath-103K, and a student that ends its answers as the teacher does.

    pip install datasets
    python recipes/reasoning/gpu/make.py Qwen/Qwen3-8B-Base Qwen/Qwen3-32B runs/deepmath/8b

Writes runs/deepmath/prompts.jsonl, runs/deepmath/heldout.jsonl and the student's folder. A base model has another
end-of-sequence token and no say about the chat format: it gets the teacher's tokenizer, which has the same vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path("runs/deepmath")
HELD_OUT = 200
WISH = "\n\nReason step by step, and put the final answer within \\boxed{}."


def main(student: str, teacher: str, folder: str) -> None:
    write_prompts()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(student, dtype="auto")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts() -> None:
    from datasets import load_dataset

    FOLDER.mkdir(parents=True, exist_ok=True)
    data = load_dataset("zwhe99/DeepMath-103K", split="train")
    lines = [json.dumps({"prompt": row["question"] + WISH, "answer": row["final_answer"]}) + "\n" for row in data]
    (FOLDER / "heldout.jsonl").write_text("".join(lines[:HELD_OUT]), encoding="utf-8")
    (FOLDER / "prompts.jsonl").write_text("".join(lines[HELD_OUT:]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
