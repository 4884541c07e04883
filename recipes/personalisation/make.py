"""Makes what the recipe learns from and is graded with: documents, questions, chat prompts, and chats of the model.

SmolLM2-135M-Instruct must be there (recipes/smollm2/make.py). It writes the background chats itself: an answer to each chat
prompt, at temperature 1. Only answers that end are kept, since an answer that is cut off would teach to stop there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from company import SETS, graded, learned
from evaluate import Model
from instructions import chat_prompts, graded_prompts
from series import write_rows

RUNS, BASE = Path("runs/personalisation"), Path("runs/smollm2/teacher")
MAX_NEW_TOKENS, AT_ONCE = 80, 65


def make() -> None:
    """Writes into runs/personalisation; nothing where that is done."""
    chats = RUNS / "chats.jsonl"
    if chats.exists():  # written last
        return
    for name in SETS:
        write_rows(RUNS / f"learned-{name}.jsonl", learned(name))
        write_rows(RUNS / f"graded-{name}.jsonl", graded(name))
    prompts = list(chat_prompts())
    write_rows(RUNS / "prompts.jsonl", prompts)
    write_rows(RUNS / "instructions.jsonl", graded_prompts())
    write_rows(chats, _answered(prompts))


def _answered(prompts: list[dict[str, str]]) -> list[dict[str, str]]:
    torch.manual_seed(0)
    model, rows = Model(BASE), []
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start : start + AT_ONCE]
        answers = model.answers([row["prompt"] for row in part], MAX_NEW_TOKENS, sampled=True)
        rows += [
            {**row, "completion": answer.text.strip()}
            for row, answer in zip(part, answers, strict=True)
            if answer.ended and answer.text.strip()
        ]
    return rows
