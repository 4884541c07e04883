"""What the prompts of a run take: memory, and seconds at its start."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.lib.pair import word_tokenizer

WORDS = (40, 120)  # of a prompt: a token each
VOCABULARY = 32_768
PARTS = ("read", "encode", "fingerprint")


def measure_prompts(counts: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of prompts, each from a new process: what one leaves behind, the next would use."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.map(_measured, counts, chunksize=1)


def _measured(count: int) -> dict[str, Any]:
    from fastkl.trainer.config.data import DataConfig
    from fastkl.trainer.data.prompts import encode_prompts
    from fastkl.trainer.data.sources import load_prompts
    from fastkl.trainer.runs.identity import rows_fingerprint

    with TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(_lines(count))
        few = DataConfig(path=str(path), limit=100)
        tokenizer = word_tokenizer(VOCABULARY)
        encode_prompts(load_prompts(few), tokenizer, few)  # makes what is made once
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, clocks, data = _status("VmRSS"), [time.process_time()], DataConfig(path=str(path))
        rows = load_prompts(data)
        clocks.append(time.process_time())
        prompts = encode_prompts(rows, tokenizer, data)
        clocks.append(time.process_time())
        held, peak = _status("VmRSS") - before, _status("VmHWM") - before
        rows_fingerprint(prompts)
        clocks.append(time.process_time())
        seconds = {name: end - start for name, start, end in zip(PARTS, clocks, clocks[1:], strict=False)}
        characters = path.stat().st_size / count
    tokens = int(prompts.ids.lengths.sum()) / count
    return {"prompts": count, "tokens": tokens, "characters": characters, "held": held, "peak": peak, **seconds}


def _lines(count: int) -> Iterable[str]:
    rng = random.Random(0)
    for _ in range(count):
        text = " ".join(f"w{rng.randrange(VOCABULARY - 2)}" for _ in range(rng.randint(*WORDS)))
        yield json.dumps({"prompt": text, "answer": str(rng.randrange(10**4)), "metadata": {"level": 1}}) + "\n"


def _status(name: str) -> int:
    """Bytes of this process, of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
