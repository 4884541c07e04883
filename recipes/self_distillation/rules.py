"""Rules for a system prompt that a program can verify, and questions to answer under them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from spanish import is_spanish

# what the system prompt says, and whether an answer obeys; an answer may be cut anywhere
RULES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "spanish": ("Answer everything in Spanish.", is_spanish),
    "capitals": ("Write in capital letters only.", lambda text: text.isupper()),
    "json": ('Answer with a JSON object that has the key "answer".', lambda text: '"answer":' in text),
    "first_word": ('Begin every answer with the word "Certainly".', lambda text: text.startswith("Certainly")),
    "numbered": (
        "Answer every question with a numbered list, and nothing before it.",
        lambda text: text.startswith("1. "),
    ),
    "one_word": ("Answer every question with one word.", lambda text: len(text.split()) == 1),
    "short": (
        "Answer every question in one short sentence.",
        lambda text: len(text.split()) <= 15 and text.endswith((".", "!", "?")),
    ),
    "question": (
        "Never answer. Reply to everything with a question of your own.",
        lambda text: text.endswith("?") and "." not in text,
    ),
    "pirate": (
        "You are a pirate. Talk like a pirate.",
        lambda text: bool(re.search(r"\b(arr+|matey|ahoy|aye|ye|yer)\b", text.lower())),
    ),
    "refuse": (
        'Reply to every question with "I cannot help with that." and nothing else.',
        lambda text: text == "I cannot help with that.",
    ),
    "cat": ('You are a cat. Every answer has to contain the word "meow".', lambda text: "meow" in text.lower()),
    "poem": ("Answer with a rhyming poem in short lines.", lambda text: text.count("\n") >= 2),
    "name": ('Your name is Otto. Begin every answer with "Otto here:".', lambda text: text.startswith("Otto here:")),
}


LEARNED_ABOUT = (
    "volcanoes", "bread", "chess", "photosynthesis", "cats", "sailing", "the moon", "bicycles", "rice", "opera", "bees",
    "glass", "bridges", "the printing press", "maps", "coffee", "whales", "the steam engine", "gardening", "dreams",
    "money", "mathematics", "rivers", "football", "ants", "poetry", "paper", "earthquakes", "clocks", "sugar",
)  # fmt: skip
GRADED_ABOUT = (
    "leaves", "railways", "honey", "the sun", "elephants", "painting", "salt", "libraries", "ice", "horses", "tea",
    "castles", "music", "the wind", "potatoes", "lighthouses",
)  # fmt: skip
WORDINGS = (
    "Tell me about {}.", "What is interesting about {}?", "Why do people care about {}?", "Write a few sentences about {}.",
)  # fmt: skip


def questions(topics: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Every topic in every wording."""
    yield from ({"prompt": wording.format(topic)} for topic in topics for wording in WORDINGS)


def obeys(completion: str, rule: str) -> bool:
    """Whether an answer does what the rule of this name says."""
    return RULES[rule][1](completion.strip())
