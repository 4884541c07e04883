"""Instructions that a program can verify, after IFEval (Zhou et al., 2023), and chat prompts that hold them.

A terse answer does not meet any of them by chance. None has to do with the company of `company.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

# what is asked for, and whether an answer does it
INSTRUCTIONS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "capitals": (
        "Write your whole answer in capital letters.",
        lambda text: text.isupper(),
    ),
    "first_word": (
        'Begin your answer with the word "Certainly".',
        lambda text: text.lstrip(" \"'*").startswith("Certainly"),
    ),
    "numbered": (
        "Answer with a numbered list.",
        lambda text: numbers_of_list(text)[:2] == [1, 2],
    ),
    "bullets": (
        'Answer with a bulleted list; each bullet begins with "- ".',
        lambda text: len(re.findall(r"^- \S", text, re.MULTILINE)) >= 2,
    ),
    "words": (
        "Write at least 30 words.",
        lambda text: len(text.split()) >= 30,
    ),
    "json": (
        'Answer with nothing but a JSON object that has the key "answer".',
        lambda text: is_json_with(text, "answer"),
    ),
}
LEARNED_WITH = (
    "Explain why the sky is blue.", "Give advice on how to sleep better.", "Describe a walk in the mountains.",
    "What should one pack for a week at sea?", "Explain what a volcano is.", "Why do cats purr?", "How is bread made?",
    "Tell me about the history of chess.", "What is photosynthesis?", "How can I learn to draw?",
)  # fmt: skip
GRADED_WITH = (
    "Why do leaves fall in autumn?", "Give advice on how to save money.", "Describe a busy railway station.",
    "Explain how a bicycle stays upright.",
)  # fmt: skip


def chat_prompts() -> Iterator[dict[str, str]]:
    """Prompts to distil on: each topic once without an instruction, and once with each of them."""
    for topic in LEARNED_WITH:
        yield {"prompt": topic}
        yield from ({"prompt": f"{topic} {wording}"} for wording, _ in INSTRUCTIONS.values())


def graded_prompts() -> Iterator[dict[str, str]]:
    """Prompts to grade on: other topics, each with each instruction, whose name is the `answer`."""
    for topic in GRADED_WITH:
        for name, (wording, _) in INSTRUCTIONS.items():
            yield {"prompt": f"{topic} {wording}", "answer": name}


def follows(completion: str, instruction: str) -> bool:
    """Whether an answer does what the instruction of this name asks for."""
    return INSTRUCTIONS[instruction][1](completion.strip())


def numbers_of_list(text: str) -> list[int]:
    """The numbers at the beginnings of lines: 1 and 2 of "1. Eat\\n2) Sleep"."""
    return [int(number) for number in re.findall(r"^(\d+)[.)] ", text, re.MULTILINE)]


def is_json_with(text: str, key: str) -> bool:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) and key in value
