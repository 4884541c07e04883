"""What fine-tuning learns from: outputs of the model with its context, as many as a budget of FLOPs writes and learns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from evaluate import Model
from parts import HERE, Part, Row
from series import write_rows

from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.models.loading import outline_of_student
from fastkl.trainer.models.pretrained import outline
from fastkl.trainer.models.sizes.flops import cost_of, sampling_flops, training_flops
from fastkl.trainer.runs.files import write_text

AT_ONCE = 16


def prepare_outputs(part: Part, run: Path, length: int, seed: int, budget: float) -> tuple[Row, float]:
    """The settings of a run of `sft` that spends the budget, and the FLOPs of writing what it reads.

    Outputs have at most `length` times as many tokens as the samples of `distill`.
    """
    if not budget:
        sys.exit(f"sft may spend the FLOPs of distill: run the arm distill of {part.name} with seed {seed} first")
    path, plan = run.with_name(f"{run.name}.jsonl"), run.with_name(f"{run.name}.json")
    config = parse(["sft", str(HERE / "sft.yaml")])[1]
    if not plan.exists():  # written last
        rows, writing = within(budget, part, config.student, length, seed)
        write_rows(path, rows)
        write_text(plan, json.dumps({"steps": len(rows) // config.examples_per_step, "writing": writing}) + "\n")
    found = json.loads(plan.read_text())
    return {"data.path": path, "optim.steps": found["steps"]}, found["writing"]


def within(budget: float, part: Part, student: Any, length: int, seed: int) -> tuple[list[Row], float]:
    """Rows to learn from until the budget is spent, and what it cost to write them."""
    model, writer, learner = Model(student.path), cost_of(outline(student)), cost_of(outline_of_student(student))
    rows: list[Row] = []
    writing = learning = 0.0
    for row, text in written(model, part, length, seed):
        writing += sampling_flops(writer, [model.sample(part.chat(row, prompted=True), text)])
        learning += training_flops(learner, [model.sample(part.chat(row, prompted=False), text)])
        if writing + learning > budget:
            break
        if text.strip():
            rows.append({"prompt": row["prompt"], "completion": text})
    return rows, writing


def written(model: Model, part: Part, length: int, seed: int) -> Iterator[tuple[Row, str]]:
    """Rows and what the model with its context answers to them, without end."""
    torch.manual_seed(seed)
    while True:
        asked = [part.learned[index] for index in torch.randperm(len(part.learned))[:AT_ONCE].tolist()]
        chats = [part.chat(row, prompted=True) for row in asked]
        texts = model.answers(chats, length * part.config.sampling.max_new_tokens, sampled=True)
        yield from zip(asked, texts, strict=True)
