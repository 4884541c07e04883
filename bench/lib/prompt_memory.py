"""What the prompts of a run take: memory, and seconds at its start."""

from __future__ import annotations

import json
import multiprocessing
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

CHARACTERS = (200, 600)  # of a prompt: so much of a text in English
PARTS = ("read", "encode", "access", "fingerprint")
STEP, STEPS = 512, 4  # rows of a step, and how many steps are read


def measure_prompts(counts: Sequence[int], tokenizer: str) -> list[dict[str, Any]]:
    """A row for each number of prompts, each from a new process: what one leaves behind, the next would use.

    `tokenizer` is a folder.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.map(partial(_measured, folder=tokenizer), counts, chunksize=1)


def _measured(count: int, folder: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from fastkl.trainer.config.data import DataConfig
    from fastkl.trainer.data.order import batch_indices
    from fastkl.trainer.data.prompts import encode_prompts
    from fastkl.trainer.data.sources import load_prompts
    from fastkl.trainer.runs.identity import rows_fingerprint

    with TemporaryDirectory() as place:
        path = Path(place) / "prompts.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(_lines(count))
        few = DataConfig(path=str(path), limit=100, chat_template=False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encode_prompts(load_prompts(few), tokenizer, few)  # makes what is made once
        before, clocks, data = _memory(), [time.process_time()], DataConfig(path=str(path), chat_template=False)
        with _watched() as seen:
            rows = load_prompts(data)
            clocks.append(time.process_time())
            prompts = encode_prompts(rows, tokenizer, data)
            clocks.append(time.process_time())
            held = _memory() - before
        peak = max([*seen, before + held]) - before
        for step in range(STEPS):
            assert len([prompts[index] for index in batch_indices(len(prompts), STEP, step, 0)]) == STEP
        clocks.append(time.process_time())
        rows_fingerprint(prompts)
        clocks.append(time.process_time())
        seconds = {name: end - start for name, start, end in zip(PARTS, clocks, clocks[1:], strict=False)}
        characters = path.stat().st_size / count
    seconds["access"] /= STEPS
    tokens = int(prompts.ids.lengths.sum()) / count
    return {"prompts": count, "tokens": tokens, "characters": characters, "held": held, "peak": peak, **seconds}


def _lines(count: int) -> Iterable[str]:
    """Rows with pieces of the reference of the Python language, which comes with Python."""
    text = " ".join(word for topic in topics.values() for word in topic.split())
    rng = random.Random(0)
    for _ in range(count):
        length = rng.randint(*CHARACTERS)
        start = rng.randrange(len(text) - length)
        prompt = text[start : start + length]
        yield json.dumps({"prompt": prompt, "answer": str(rng.randrange(10**4)), "metadata": {"level": 1}}) + "\n"


@contextmanager
def _watched() -> Iterator[list[int]]:
    """The process's memory, looked at again and again."""
    seen, over = list[int](), threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            seen.append(_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _memory() -> int:
    """Bytes of this process, of Linux; without pages of files, which the kernel takes back as it likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
