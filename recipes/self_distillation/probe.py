"""Which contexts the model obeys at all, before it is trained: rules of a system prompt, and tasks that examples show.

    python recipes/self_distillation/probe.py

Answers are greedy, or sampled at temperature 1. The result is runs/self_distillation/probe.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

sys.path.append(str(Path(__file__).parents[1]))

import torch
from evaluate import Model
from measure import BASE, make_model
from parts import RUNS, Chat, Row, chat_of
from rules import GRADED_ABOUT, RULES, obeys, questions
from series import write_report
from tasks import TASKS, is_right

SHOWN = (0, 4, 8)  # examples
TRIED = slice(8, 24)  # words
LENGTHS = {"rule": 32, "task": 8}  # of answers, in tokens


def main() -> None:
    make_model()
    torch.manual_seed(0)
    model = Model(BASE)
    write_report(RUNS / "probe.json", [*rules(model), *tasks(model)])


def rules(model: Model) -> Iterator[Row]:
    """How often each rule is obeyed, with it as the system prompt and without."""
    asked = [row["prompt"] for row in questions(GRADED_ABOUT)][::5]  # every topic, in turns of wordings
    plain = answers(model, [chat_of([("user", question)]) for question in asked], "rule")
    for name, (system, _) in RULES.items():
        given = answers(model, [chat_of([("system", system), ("user", question)]) for question in asked], "rule")
        for how in given:
            without, with_rule = (fmean(obeys(text, name) for text in found[how]) for found in (plain, given))
            yield {"rule": name, "answers": how, "without": without, "with": with_rule, "count": len(asked)}


def tasks(model: Model) -> Iterator[Row]:
    """How often each task is solved after some examples; words that are tried are not among them."""
    for name, pairs in TASKS.items():
        turns = [turn for pair in pairs.items() for turn in zip(("user", "assistant"), pair, strict=True)]
        tried = list(pairs.items())[TRIED]
        for shown in SHOWN:
            chats = [chat_of([*turns[: 2 * shown], ("user", word)]) for word, _ in tried]
            for how, texts in answers(model, chats, "task").items():
                right = [is_right(text, answer.lower()) for text, (_, answer) in zip(texts, tried, strict=True)]
                yield {"task": name, "answers": how, "examples": shown, "right": fmean(right), "count": len(tried)}


def answers(model: Model, chats: Sequence[Chat], kind: str) -> dict[str, list[str]]:
    """Both ways of answering."""
    return {how: model.answers(chats, LENGTHS[kind], sampled=how == "sampled") for how in ("greedy", "sampled")}


if __name__ == "__main__":
    main()
