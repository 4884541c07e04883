"""Two students and two teachers of one task, with one tokenizer and with two, and fine-tuning on the teacher's text.

    python recipes/tokenizers/compare.py            # three seeds
    python recipes/tokenizers/compare.py 0          # these seeds

All runs are in one process, since each is short. What is complete is not run again, what was interrupted goes on. The
result is runs/tokenizers/comparison.json; the README's table is made of the copy beside it.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

# Models this small leave nothing for a second thread to do.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.append(str(Path(__file__).parents[1]))

import make
import torch
from series import Row, accuracies, run_here, total_flops, write_report, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkl.trainer.runs.files import read_jsonl

HERE, RUNS = Path(__file__).parent, Path("runs/tokenizers")
KINDS = ("letters", "pairs")
# The teacher has its own tokenizer, and judges samples, or its distributions over common tokens are learned; it has the
# student's tokenizer; its text is learned.
COMPARED = ("reverse_kl", "top_k")
ARMS = ("own", *COMPARED, "same", "sft")
ALIGNMENT = "alignment/"


def main() -> None:
    seeds = [int(word) for word in sys.argv[1:]] or [0, 1, 2]
    make.main()
    for kind, role in itertools.product(KINDS, make.LAYERS):
        learn(kind, role)
    found = []
    for seed, kind, arm in itertools.product(seeds, KINDS, ARMS):
        found.append(measured(kind, arm, seed))
        write_report(RUNS / "comparison.json", found)
        print(found[-1], flush=True)


def learn(kind: str, role: str) -> None:
    run_here("sft", HERE / f"{role}.yaml", RUNS / kind / role, {"student.path": make.DATA / kind / role})


def measured(kind: str, arm: str, seed: int) -> Row:
    run, command = folder(kind, arm, seed), command_of(arm)
    if arm == "sft" and not texts(other(kind), seed).exists():
        write_texts(other(kind), seed)
    run_here(command, HERE / f"{command}.yaml", run, settings(kind, arm, seed))
    last = read_jsonl(run / "metrics.jsonl")[-1]
    alignment = {name: value for name, value in last.items() if name.startswith(ALIGNMENT)}
    known = {"student": kind, "arm": arm, "seed": seed}
    return {**known, "accuracy": accuracies(run), "flops": total_flops(run), **alignment}


def other(kind: str) -> str:
    return KINDS[1 - KINDS.index(kind)]


def folder(kind: str, arm: str, seed: int) -> Path:
    return RUNS / f"{kind}-{arm}-{seed}"


def command_of(arm: str) -> str:
    """Of `fastkl`, which is its config's name too."""
    return "sft" if arm == "sft" else "distill"


def settings(kind: str, arm: str, seed: int) -> Row:
    """What differs from the arm's config."""
    given: Row = {"student.path": RUNS / kind / "student" / "student", "seed": seed}
    if arm == "sft":
        return {**given, "data.path": texts(other(kind), seed)}
    if arm in COMPARED:
        given["loss.objective"] = arm
    given["teacher.path"] = RUNS / (kind if arm == "same" else other(kind)) / "teacher" / "student"
    return {**given, "teacher.tokenizer": "null"} if arm == "same" else given


def texts(kind: str, seed: int) -> Path:
    return RUNS / kind / f"written-{seed}.jsonl"


def write_texts(kind: str, seed: int) -> None:
    """What the teacher samples to each prompt."""
    folder = RUNS / kind / "teacher" / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = read_jsonl(make.DATA / "train.jsonl")
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    held = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    torch.manual_seed(seed)
    found = model.generate(**held.to(model.device), do_sample=True, top_k=0, max_new_tokens=17)
    written = tokenizer.batch_decode(found[:, held["input_ids"].shape[1] :], skip_special_tokens=True)
    pairs = zip(rows, written, strict=True)
    write_rows(texts(kind, seed), ({"prompt": row["prompt"], "completion": text} for row, text in pairs if text))


if __name__ == "__main__":
    main()
