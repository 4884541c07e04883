"""What the page shows of a sample whose teacher has its own tokenizer: the tokens of both, segment by segment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import compress
from typing import Any

from fastkl.trainer.runs.report.curves import Json, plain


def segments_of(record: Json) -> Json:
    """The segment of each counted token (0: none), and of each segment by its number:

    student, teacher: the texts and log-probs of its tokens. kl: the student's log-prob of it less the teacher's. share:
    that over the number of the student's tokens, which is how dark each of them is.
    """
    mask = record["loss_mask"]
    places = list(compress(record["segments"], mask))
    ours = _by_segment(zip(places, *_counted(record, mask, "tokens", "sampler_logprobs"), strict=True))
    theirs = zip(
        record["teacher_segments"], record["teacher_tokens"], record["teacher_completion_logprobs"], strict=True
    )
    found = _by_segment(theirs)
    return {"of": places, "segments": {str(number): _segment(own, found[number]) for number, own in ours.items()}}


def _counted(record: Json, mask: list[bool], *names: str) -> list[list[Any]]:
    return [list(compress(record[name], mask)) for name in names]


def _by_segment(tokens: Iterable[tuple[int, str, float]]) -> dict[int, list[tuple[str, float]]]:
    found: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for number, text, logprob in tokens:
        if number:
            found[number].append((text, logprob))
    return found


def _segment(ours: list[tuple[str, float]], theirs: list[tuple[str, float]]) -> Json:
    kl = sum(logprob for _, logprob in ours) - sum(logprob for _, logprob in theirs)
    return {
        "student": [_shown(*token) for token in ours],
        "teacher": [_shown(*token) for token in theirs],
        "kl": plain(round(kl, 4)),
        "share": plain(round(kl / len(ours), 4)),
    }


def _shown(text: str, logprob: float) -> list[Any]:
    return [text, plain(round(logprob, 4))]
