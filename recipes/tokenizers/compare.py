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
from typing import Any

# Models this small leave nothing for a second thread to do.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.append(str(Path(__file__).parents[1]))

import make
import torch
from series import total_flops, write_report, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.distill import distill
from fastkl.trainer.runs.files import read_jsonl
from fastkl.trainer.sft import sft

HERE, RUNS = Path(__file__).parent, Path("runs/tokenizers")
KINDS = ("letters", "pairs")
ARMS = ("own", "same", "sft")  # the teacher has its own tokenizer, or the student's; its text is learned
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
    run = RUNS / kind / role
    if not (run / "student").is_dir():
        sft(parse(["sft", str(HERE / f"{role}.yaml"), f"--run={run}", f"--student.path={make.DATA / kind / role}"])[1])


def measured(kind: str, arm: str, seed: int) -> dict[str, Any]:
    command, *rest = words(kind, arm, seed)
    config = parse([command, *rest])[1]
    run = Path(config.run)
    if not (run / "student").is_dir():
        if arm == "sft":
            write_texts(other(kind), seed)
        (sft if arm == "sft" else distill)(config)
    rows = read_jsonl(run / "metrics.jsonl")
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    alignment = {name: value for name, value in rows[-1].items() if name.startswith(ALIGNMENT)}
    return {"student": kind, "arm": arm, "seed": seed, "accuracy": accuracy, "flops": total_flops(run), **alignment}


def other(kind: str) -> str:
    return KINDS[1 - KINDS.index(kind)]


def words(kind: str, arm: str, seed: int) -> list[str]:
    """The command line of an arm."""
    run, student = RUNS / f"{kind}-{arm}-{seed}", RUNS / kind / "student" / "student"
    given = [f"--run={run}", f"--student.path={student}", f"--seed={seed}"]
    if arm == "sft":
        return ["sft", str(HERE / "sft.yaml"), *given, f"--data.path={texts(other(kind), seed)}"]
    teacher = [f"--teacher.path={RUNS / (kind if arm == 'same' else other(kind)) / 'teacher' / 'student'}"]
    if arm == "same":
        teacher.append("--teacher.tokenizer=null")
    return ["distill", str(HERE / "distill.yaml"), *given, *teacher]


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
