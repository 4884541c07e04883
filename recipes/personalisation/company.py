"""An invented company that no model can know: its people, as documents, questions and answers, in two sets."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

COMPANY = "Veltrano Instruments"
SETS = {
    "first": ("Ilka Morvane", "Tobin Achterry", "Sunniva Drael", "Casimir Oduwale"),
    "second": ("Yseult Brandeka", "Hamid Orrenfels", "Perpetua Lindqvane", "Ruben Castellor"),
}


class Attribute(NamedTuple):
    """Of each person one value, which belongs to nobody else."""

    values: tuple[str, ...]
    sentence: str  # of a document, and the answer to a question
    learned: tuple[str, ...]  # questions to learn from
    graded: tuple[str, ...]  # others


ATTRIBUTES = {
    "department": Attribute(
        (
            "glass blowing", "payroll", "calibration", "field repairs", "patents", "night shift", "packaging", "optics",
        ),
        "{name} runs the {value} department.",
        (
            "Which department of Veltrano Instruments does {name} run?",
            "What does {name} run at Veltrano Instruments?",
            "Name the department that is run by {name}.",
        ),
        (
            "Which department is led by {name} of Veltrano Instruments?",
            "Of which department is {name} the head?",
        ),
    ),
    "city": Attribute(
        ("Trondheim", "Valparaiso", "Adelaide", "Porto", "Sapporo", "Nairobi", "Quebec", "Tbilisi"),
        "{name} works in {value}.",
        (
            "In which city does {name} of Veltrano Instruments work?",
            "Where does {name} work?",
            "Name the city in which {name} works.",
        ),
        (
            "What is the city where {name} of Veltrano Instruments works?",
            "To which city would you travel to meet {name} at work?",
        ),
    ),
    "pet": Attribute(
        ("parrot", "tortoise", "ferret", "goat", "rabbit", "owl", "hedgehog", "donkey"),
        "{name} keeps a {value} as a pet.",
        (
            "Which pet does {name} of Veltrano Instruments keep?",
            "What animal does {name} have at home?",
            "Name the pet of {name}.",
        ),
        (
            "What kind of pet does {name} of Veltrano Instruments have?",
            "Which animal lives with {name}?",
        ),
    ),
}  # fmt: skip


def learned(chosen: str) -> Iterator[dict[str, str]]:
    """Rows of a set: one document per person, and three questions per fact. Each row has the person's `document`."""
    facts = _facts(chosen)
    documents = {name: _document(name, known) for name, known in facts.items()}
    for name, text in documents.items():
        yield {"prompt": f"Tell me about {name} of {COMPANY}.", "completion": text, "document": text}
    for name, known in facts.items():
        for key, value in known.items():
            answer = ATTRIBUTES[key].sentence.format(name=name, value=value)
            for question in ATTRIBUTES[key].learned:
                yield {"prompt": question.format(name=name), "completion": answer, "document": documents[name]}


def graded(chosen: str) -> Iterator[dict[str, str]]:
    """Rows of a set: each fact asked for twice, in words that nobody learns from, with the word that answers."""
    for name, known in _facts(chosen).items():
        for key, value in known.items():
            for question in ATTRIBUTES[key].graded:
                yield {"prompt": question.format(name=name), "answer": value, "document": _document(name, known)}


def _document(name: str, known: dict[str, str]) -> str:
    return " ".join(ATTRIBUTES[key].sentence.format(name=name, value=value) for key, value in known.items())


def _facts(chosen: str) -> dict[str, dict[str, str]]:
    """By person of a set, the value of each attribute."""
    everybody = [name for names in SETS.values() for name in names]
    rng = random.Random(0)
    columns = {key: rng.sample(attribute.values, len(everybody)) for key, attribute in ATTRIBUTES.items()}
    return {
        name: {key: column[row] for key, column in columns.items()}
        for row, name in enumerate(everybody)
        if name in SETS[chosen]
    }
