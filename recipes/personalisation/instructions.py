"""Instructions that a program can verify, and chat prompts that hold them. None has to do with the company.

The wordings and the verifiers are those of IFEval (Zhou et al., 2023) in the package if-verifiable. Twelve of its 25 kinds
are here. Left out are those that a terse answer meets anyway (words and commas to avoid), those that ask for the prompt's
own words, for yes or no, or for a tokenizer that NLTK downloads, and those that SmolLM2-135M met on none of four topics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# what is asked for, and with which numbers and words
INSTRUCTIONS: dict[str, dict[str, Any]] = {
    "detectable_content:number_placeholders": {"num_placeholders": 1},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:json_format": {},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": 1},
    "detectable_format:title": {},
    "keywords:existence": {"keywords": ["time", "water"]},
    "keywords:frequency": {"keyword": "people", "frequency": 2, "relation": "at least"},
    "keywords:letter_frequency": {"letter": "w", "let_frequency": 6, "let_relation": "at least"},
    "language:response_language": {"language": "es"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_words": {"num_words": 30, "relation": "at least"},
}
LEARNED_WITH = (
    "Explain why the sky is blue.", "Give advice on how to sleep better.", "Describe a walk in the mountains.",
    "What should one pack for a week at sea?", "Explain what a volcano is.", "Why do cats purr?", "How is bread made?",
    "Tell me about the history of chess.", "What is photosynthesis?", "How can I learn to draw?",
)  # fmt: skip
GRADED_WITH = (
    "What makes a good library?", "Give advice on how to learn a language.", "Describe a market on a rainy day.",
    "Explain how a refrigerator works.",
)  # fmt: skip


def chat_prompts() -> Iterator[dict[str, str]]:
    """Prompts to distil on: each topic once without an instruction, and once with each of them."""
    for topic in LEARNED_WITH:
        yield {"prompt": topic}
        yield from ({"prompt": f"{topic} {wording(kind)}"} for kind in INSTRUCTIONS)


def graded_prompts() -> Iterator[dict[str, str]]:
    """Prompts to grade on: other topics, each with each instruction, whose name is the `answer`."""
    for topic in GRADED_WITH:
        yield from ({"prompt": f"{topic} {wording(kind)}", "answer": kind} for kind in INSTRUCTIONS)


def wording(kind: str) -> str:
    """What IFEval writes into a prompt."""
    return _verifier(kind)[1]


def follows(completion: str, kind: str) -> bool:
    """Whether an answer does what the instruction of this kind asks for."""
    text = completion.strip()
    return bool(text) and bool(_verifier(kind)[0].check_following(text))


def _verifier(kind: str) -> tuple[Any, str]:
    import langdetect
    from if_verifiable.ifeval import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0  # it guesses otherwise each time
    verifier = INSTRUCTION_DICT[kind](kind)
    return verifier, verifier.build_description(**INSTRUCTIONS[kind])
