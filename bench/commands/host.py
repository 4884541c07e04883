"""What a step costs on the host beside the models: bytes and microseconds of CPU time per token, by part.

    python -m bench host                              steps of 10⁵, 10⁶ and 10⁷ tokens
    python -m bench host --tokens 100000 --repeats 5 --json host.json
    python -m bench host --tokens 100000 --prompts 10000 1000000 --tokenizer runs/smollm2/student

There is no model: a step's samples are made of random ids and log-probs, as a sampler would hand them over. One thread, and
the clock of the process's own CPU time, which other programs on the machine do not change much; the least of the rounds.

Columns of the table, keys of the JSON rows:

    tokens           of the step, prompts included
    samples          how many samples they are: a prompt of 128 tokens, a completion of 200 to 1,600
    bytes            that the samples hold at rest, per token, once they are ready for the update
    make             from a sampler's lists to samples, µs per token
    scatter          a scorer's numbers into the samples
    advantages       `set_advantages` of the policy gradient
    batch            two times batches, for scores and for the update, and what the loss takes of them
    log              metrics of all tokens, FLOPs, records of the logged samples
    exchange         to flat bytes and back, of all samples: as those that change their process, without the network
    step             scatter, advantages, batch and log together

With `--prompts`, so many are read from JSON Lines and encoded too, each number in a process of its own (Linux). They are
200 to 600 characters of English, with an answer and metadata:

    tokens, characters    of a prompt, and of its row in the file
    held, peak            bytes of the process beyond those before the first row: rows, answers, metadata, ids and all;
                          without pages of files. The peak is looked for 50 times a second
    read, encode, fingerprint    seconds of CPU time
    access                seconds of CPU time for 512 rows in a random order
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bench.lib import arguments as checked
from bench.lib.prompt_memory import measure_prompts
from bench.lib.report import circumstances
from fastkl._check.json_file import write_json
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.batching import Batch, batches
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.data.step_metrics import as_metrics, context_gap, rollout_means, teacher_kl
from fastkl.trainer.models.sizes.flops import Cost, sampling_flops, scoring_flops, training_flops
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.runs.report.samples_log import sample_records
from fastkl.trainer.runs.sharing.mismatch import mismatch_metrics
from fastkl.trainer.runs.sharing.records import pack, unpack
from fastkl.trainer.runs.sharing.samples import as_record, as_sample

TOKENS = (10**5, 10**6, 10**7)
VOCABULARY, PROMPT, SHORTEST, LONGEST = 151_936, 128, 200, 1_600
MAX_TOKENS, LOGGED = 32_768, 4
COST = Cost(7e9, 7e9, 1.2e9, 1.2e9, 16_384.0, (None,) * 36, recomputed=False)  # about that of a model of 4 B parameters
CPU = torch.device("cpu")
PARTS = ("make", "scatter", "advantages", "batch", "log", "exchange")
STEP = ("scatter", "advantages", "batch", "log")

Drawn = tuple[list[int], list[int], list[float]]  # a prompt, a completion and its log-probs


class Texts:
    """In place of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=checked.positive, nargs="+", default=list(TOKENS), help="the steps' tokens")
    parser.add_argument("--repeats", type=checked.positive, default=3, help="take the least of this many rounds")
    parser.add_argument("--prompts", type=checked.positive, nargs="+", default=[], help="measure so many prompts too")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="what encodes the prompts")
    checked.add_json(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.prompts and arguments.tokenizer is None:
        parser.error("argument --prompts: wants --tokenizer too, the folder of one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [measure(tokens, arguments.repeats) for tokens in arguments.tokens]
    finally:
        torch.set_num_threads(threads)
    prompts = measure_prompts(arguments.prompts, arguments.tokenizer) if arguments.prompts else []
    report = {"command": "host", **circumstances("cpu"), "clock": "CPU time", "rows": rows, "prompts": prompts}
    for table in filter(None, (rows, prompts)):
        _print(table)
    write_json(arguments.json, report)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    print("  ".join(f"{name:>13}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>13,}" if isinstance(value, int) else f"{value:>13.3f}" for value in row.values()))


def measure(tokens: int, repeats: int) -> dict[str, Any]:
    """A row of the table: the least of so many rounds."""
    drawn = list(_drawn(tokens))
    count = sum(len(prompt) + len(completion) for prompt, completion, _ in drawn)
    best: dict[str, float] = {}
    held = 0
    for _ in range(repeats):
        seconds, held = _step(drawn)
        best = {name: min(best.get(name, seconds[name]), seconds[name]) for name in PARTS}
    micros = {name: best[name] / count * 1e6 for name in PARTS}
    together = sum(micros[name] for name in STEP)
    return {"tokens": count, "samples": len(drawn), "bytes": held / count, **micros, "step": together}


def held_bytes(samples: Sequence[Sample]) -> int:
    """What arrays, lists and their numbers take in memory; what several share, once."""
    seen: dict[int, int] = {}
    for value in (value for sample in samples for value in vars(sample).values()):
        if isinstance(value, list):
            seen[id(value)] = sys.getsizeof(value)
            seen |= {id(number): sys.getsizeof(number) for number in value}
        elif isinstance(value, np.ndarray):
            seen[id(value)] = sys.getsizeof(value)
            base = value if value.base is None else value.base
            seen[id(base)] = base.nbytes if isinstance(base, np.ndarray | torch.Tensor) else value.nbytes
    return sum(seen.values()) + sum(sys.getsizeof(sample) + sys.getsizeof(vars(sample)) for sample in samples)


def _step(drawn: list[Drawn]) -> tuple[dict[str, float], int]:
    """CPU seconds of each part, and the bytes that the samples hold."""
    seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def clock(part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[part] += time.process_time() - start

    gc.collect()
    with clock("make"):
        samples = [make_sample(prompt, ids, index, own) for index, (prompt, ids, own) in enumerate(drawn)]
    with clock("batch"):
        scored = list(batches(samples, MAX_TOKENS, "packed", CPU))
    numbers = [-torch.rand(len(batch.tokens)) for batch in scored]
    with clock("scatter"):
        for batch, own in zip(scored, numbers, strict=True):
            batch.scatter(own, "teacher_logprobs")
    del scored, numbers
    for sample in samples:
        sample.old_logprobs = sample.sampler_logprobs
    with clock("advantages"):
        set_advantages(samples, LossConfig())
    with clock("batch"):
        minibatch = sorted(samples, key=lambda sample: len(sample.ids))
        weight = sum(sample.weight for sample in minibatch)
        taken = [_taken(batch, weight) for batch in batches(minibatch, MAX_TOKENS, "packed", CPU)]
    logprobs = [batch.per_token("sampler_logprobs") for batch in taken]
    with clock("log"):
        _logged(samples, taken, logprobs)
    held = held_bytes(samples)
    del taken, logprobs
    with clock("exchange"):
        records = unpack(*pack([as_record(sample) for sample in samples]))
        assert len([as_sample(record) for record in records]) == len(samples)
    return seconds, held


def _taken(batch: Batch, weight: float) -> Batch:
    """A batch of which a loss has taken what it needs."""
    batch.per_token("advantages"), batch.per_token("old_logprobs"), batch.parts(weight)
    assert batch.weighed_tokens
    return batch


def _logged(samples: list[Sample], taken: list[Batch], logprobs: list[torch.Tensor]) -> None:
    metrics = as_metrics([rollout_means(samples) | teacher_kl(samples) | context_gap(samples)])
    flops: tuple[Callable[[Cost, Sequence[Sample]], float], ...] = (sampling_flops, scoring_flops, training_flops)
    metrics |= {count.__name__: count(COST, samples) for count in flops}
    metrics |= mismatch_metrics([batch.beside_sampler(own) for batch, own in zip(taken, logprobs, strict=True)])
    json.dumps(metrics)
    texts: Any = Texts()
    for record in sample_records(samples[:LOGGED], texts, 1):
        json.dumps(record)


def _drawn(tokens: int) -> Iterator[Drawn]:
    """As many as have about so many tokens together; the same whenever they are drawn."""
    random = np.random.default_rng(0)
    while tokens > 0:
        length = int(random.integers(SHORTEST, LONGEST + 1))
        prompt, completion = (random.integers(VOCABULARY, size=size).tolist() for size in (PROMPT, length))
        yield prompt, completion, (-random.random(length, dtype=np.float32)).tolist()
        tokens -= PROMPT + length
