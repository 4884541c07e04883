"""An invented company that no model can know: its people, as documents, questions and answers."""

from __future__ import annotations

import random
from collections.abc import Iterator

COMPANY = "Veltrano Instruments"
PEOPLE = ("Ilka Morvane", "Tobin Achterry", "Sunniva Drael", "Casimir Oduwale", "Yseult Brandeka", "Hamid Orrenfels")
DEPARTMENTS = ("glass blowing", "payroll", "calibration", "field repairs", "patents", "night shift")
CITIES = ("Trondheim", "Valparaiso", "Adelaide", "Porto", "Sapporo", "Nairobi")
PETS = ("parrot", "tortoise", "ferret", "goat", "rabbit", "owl")

# attribute -> its values, the sentence of a document, questions to learn from, and one that is kept for grading
ATTRIBUTES: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], str]] = {
    "department": (
        DEPARTMENTS,
        "{name} runs the {value} department.",
        (
            "Which department of Veltrano Instruments does {name} run?",
            "What does {name} run at Veltrano Instruments?",
            "Name the department that is run by {name}.",
        ),
        "Which department is led by {name} of Veltrano Instruments?",
    ),
    "city": (
        CITIES,
        "{name} works in {value}.",
        (
            "In which city does {name} of Veltrano Instruments work?",
            "Where does {name} work?",
            "Name the city in which {name} works.",
        ),
        "What is the city where {name} of Veltrano Instruments works?",
    ),
    "pet": (
        PETS,
        "{name} keeps a {value} as a pet.",
        (
            "Which pet does {name} of Veltrano Instruments keep?",
            "What animal does {name} have at home?",
            "Name the pet of {name}.",
        ),
        "What kind of pet does {name} of Veltrano Instruments have?",
    ),
}  # fmt: skip


def documents_and_questions() -> Iterator[dict[str, str]]:
    """Rows with `prompt` and `completion`: one document per person, and three questions per fact."""
    facts = _facts()
    for name, known in facts.items():
        sentences = (ATTRIBUTES[attribute][1].format(name=name, value=value) for attribute, value in known.items())
        yield {"prompt": f"Tell me about {name} of {COMPANY}.", "completion": " ".join(sentences)}
    for name, known in facts.items():
        for attribute, value in known.items():
            _, sentence, questions, _ = ATTRIBUTES[attribute]
            for question in questions:
                yield {"prompt": question.format(name=name), "completion": sentence.format(name=name, value=value)}


def held_out_questions() -> Iterator[dict[str, str]]:
    """Rows with `prompt` and `answer`: each fact asked for in words that are not in the training data."""
    for name, known in _facts().items():
        for attribute, value in known.items():
            yield {"prompt": ATTRIBUTES[attribute][3].format(name=name), "answer": value}


def _facts() -> dict[str, dict[str, str]]:
    """By person, the value of each attribute; every value belongs to one person."""
    rng = random.Random(0)
    columns = {attribute: rng.sample(values, len(PEOPLE)) for attribute, (values, *_) in ATTRIBUTES.items()}
    return {name: {key: column[row] for key, column in columns.items()} for row, name in enumerate(PEOPLE)}
