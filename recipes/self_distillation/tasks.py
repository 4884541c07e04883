"""Tasks that examples show and nothing names: the prompt is a word or a sentence, the answer is one word."""

from __future__ import annotations

KINDS = {
    "bird": (
        "sparrow eagle owl duck crow robin swan parrot pigeon falcon goose penguin raven hawk stork seagull finch turkey "
        "heron ostrich vulture pelican"
    ),
    "fish": (
        "trout salmon shark tuna cod herring carp pike eel bass sardine mackerel anchovy perch goldfish catfish sole "
        "haddock halibut flounder sturgeon swordfish"
    ),
    "fruit": (
        "apple banana cherry pear grape plum peach lemon orange mango melon fig kiwi apricot papaya lime date pineapple "
        "strawberry raspberry blueberry grapefruit"
    ),
    "vegetable": (
        "carrot potato onion cabbage spinach broccoli celery turnip radish lettuce cauliflower leek asparagus kale "
        "beetroot eggplant zucchini artichoke parsnip garlic cucumber pea"
    ),
}
EXAMPLES, LEARNED = 2, 10  # words of each kind; the other ten are graded


def _by_turns() -> dict[str, str]:
    """The words with their kinds: one of each kind, then the next of each."""
    words = {kind: text.split() for kind, text in KINDS.items()}
    return {word: kind for row in zip(*words.values(), strict=True) for kind, word in zip(words, row, strict=True)}


TASKS: dict[str, dict[str, str]] = {
    "kind": _by_turns(),
    "opposite": dict(pair.split() for pair in (
        "hot cold", "big small", "up down", "fast slow", "old young", "happy sad", "light dark", "open closed", "rich poor",
        "early late", "hard soft", "wet dry", "left right", "full empty", "high low", "good bad", "strong weak",
        "loud quiet", "near far", "love hate", "day night", "long short", "clean dirty", "black white",
    )),
    "past": dict(pair.split() for pair in (
        "go went", "eat ate", "run ran", "see saw", "take took", "write wrote", "sing sang", "think thought", "buy bought",
        "drive drove", "fall fell", "give gave", "know knew", "make made", "speak spoke", "swim swam", "find found",
        "break broke", "come came", "grow grew", "hold held", "lose lost", "sleep slept", "teach taught",
    )),
    "capital": dict(pair.split() for pair in (
        "France Paris", "Italy Rome", "Spain Madrid", "Germany Berlin", "Japan Tokyo", "Egypt Cairo", "Russia Moscow",
        "England London", "Greece Athens", "Portugal Lisbon", "Austria Vienna", "China Beijing", "Norway Oslo", "Peru Lima",
        "Cuba Havana", "Kenya Nairobi", "Ireland Dublin", "Poland Warsaw", "Hungary Budapest", "Sweden Stockholm",
        "Denmark Copenhagen", "Finland Helsinki", "Iran Tehran", "Iraq Baghdad",
    )),
}  # fmt: skip


def parts_of_kind() -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """The rows of the task "kind": the teacher's examples, those to learn from, those to grade on."""
    rows = [{"prompt": word, "answer": kind, "completion": kind} for word, kind in TASKS["kind"].items()]
    first, second = EXAMPLES * len(KINDS), (EXAMPLES + LEARNED) * len(KINDS)
    return rows[:first], rows[first:second], rows[second:]


def is_right(completion: str, answer: str) -> bool:
    """Whether the answer stands there and nothing else, in any case, with or without a full stop."""
    return completion.strip().rstrip(".").lower() == answer
