"""Which contexts the model obeys at all, before it is trained: rules of a system prompt, and tasks that examples show.

    python recipes/self_distillation/probe.py

Answers are greedy. The result is runs/self_distillation/probe.json.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

sys.path.append(str(Path(__file__).parents[1]))

from evaluate import Model
from measure import BASE, make_model
from parts import RUNS, Row, chat_of
from rules import GRADED_ABOUT, RULES, obeys, questions
from series import write_report
from tasks import TASKS, is_right

SHOWN = (0, 8)  # examples
TRIED = slice(8, 24)  # words


def main() -> None:
    make_model()
    model = Model(BASE)
    write_report(RUNS / "probe.json", [*rules(model), *tasks(model)])


def rules(model: Model) -> Iterator[Row]:
    """How often each rule is obeyed, with it as the system prompt and without."""
    asked = [row["prompt"] for row in questions(GRADED_ABOUT)][::9]  # in turns of wordings
    plain = model.answers([chat_of([("user", question)]) for question in asked], 32)
    for name, (system, _) in RULES.items():
        given = model.answers([chat_of([("system", system), ("user", question)]) for question in asked], 32)
        without, with_rule = (fmean(obeys(text, name) for text in texts) for texts in (plain, given))
        yield {"rule": name, "without": without, "with": with_rule, "answers": len(asked)}


def tasks(model: Model) -> Iterator[Row]:
    """How often each task is solved after some examples; words that are tried are not among them."""
    for name, pairs in TASKS.items():
        turns = [turn for pair in pairs.items() for turn in zip(("user", "assistant"), pair, strict=True)]
        tried = list(pairs.items())[TRIED]
        for shown in SHOWN:
            texts = model.answers([chat_of([*turns[: 2 * shown], ("user", word)]) for word, _ in tried], 8)
            right = [is_right(text, answer.lower()) for text, (_, answer) in zip(texts, tried, strict=True)]
            yield {"task": name, "examples": shown, "right": fmean(right), "answers": len(tried)}


if __name__ == "__main__":
    main()
