"""On-policy distillation on a pair of models: seconds per step by phase, tokens per second, peak memory.

    python -m bench train --device cuda --json train.json
    python -m bench train --pair runs/smollm2 --json train.json        teacher/, student/ and prompts.jsonl are there
    python -m bench train --device cpu --pair runs/smollm2 --impl fastkl,trl_distillation --prompts 8 --new-tokens 24

Without --pair one is generated: a random Llama with a vocabulary of Qwen3's size as the teacher, the same with noise on its
weights as the student, and prompts of random words. The speed is that of a real run; what is learned means nothing.
Every trainer does the same work (bench/trainers/) in a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import trainers
from bench.lib.machine import describe_machine, describe_versions
from bench.trainers import PHASES, Job


class Size(NamedTuple):
    """The generated pair and the run on it."""

    vocabulary: int
    hidden: int
    layers: int
    prompts: int  # per step
    new_tokens: int
    steps: int


SIZES = {"full": Size(151936, 1024, 12, 64, 128, 6), "small": Size(300, 64, 2, 8, 12, 3)}
SPREAD = 6.0  # scale of the last norm: next-token distributions of a few nats
NOISE = 0.2  # between student and teacher, relative to the weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="what the figures are said to be of")
    parser.add_argument(
        "--impl", default="fastkl", help=f"trainers, with commas between: {', '.join(trainers.names())}"
    )
    parser.add_argument("--pair", type=Path, metavar="FOLDER", help="teacher/, student/ and prompts.jsonl")
    parser.add_argument("--small", action="store_true", help="a tiny pair and a short run, for a dry run")
    parser.add_argument("--prompts", type=int, help="prompts of a step, the same ones in each (default: by size)")
    parser.add_argument("--new-tokens", type=int, help="tokens of each completion (default: by size)")
    parser.add_argument("--steps", type=int, help="steps, the first of which warms up (default: by size)")
    parser.add_argument(
        "--clock",
        choices=tuple(trainers.CLOCKS),
        default="wall",
        help="seconds of the wall's, or of the processor's, for a machine that others use too (default: wall)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here; use --device cpu")
    if arguments.device == "cuda" and arguments.clock == "cpu":
        parser.error("argument --clock: cpu says nothing of a GPU; leave it at wall with --device cuda")
    names = arguments.impl.split(",")
    for name in names:
        if name not in trainers.names():
            parser.error(f"argument --impl: {name!r} is no trainer; known are {', '.join(trainers.names())}")
    size = SIZES["small" if arguments.small else "full"]
    asked = {name: getattr(arguments, name) for name in ("prompts", "new_tokens", "steps")}
    for name, value in asked.items():
        if value is not None and value < (2 if name == "steps" else 1):
            parser.error(f"argument --{name.replace('_', '-')}: {value} is too few")
    size = size._replace(**{name: value for name, value in asked.items() if value is not None})
    with tempfile.TemporaryDirectory() as folder:
        pair = _prepare(Path(folder), arguments.pair, size)
        job = Job(str(pair), folder, arguments.device, size.prompts, size.new_tokens, size.steps, arguments.clock)
        results = {name: _measure(name, job) for name in dict.fromkeys(names)}
    report = {
        "trainers": results,
        "job": {name: value for name, value in vars(job).items() if name not in ("pair", "folder")},
        "pair": "generated" if arguments.pair is None else str(arguments.pair),
        "machine": describe_machine(arguments.device),
        "versions": describe_versions("transformers", "accelerate"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    _show(results)
    if all("skipped" in result for result in results.values()):
        sys.exit(1)


def _prepare(folder: Path, given: Path | None, size: Size) -> Path:
    """A folder with the pair and exactly the prompts of one step."""
    pair = folder / "pair"
    if given is None:
        _make_pair(pair, size)
        given = pair
    else:
        pair.mkdir()
        for name in ("teacher", "student"):
            (pair / name).symlink_to((given / name).resolve())
    lines = (given / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[: size.prompts]
    (pair / "prompts.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return pair


def _measure(name: str, job: Job) -> dict[str, Any]:
    """Medians over the steps after the first, which warms up; or why there are none."""
    folder = Path(job.folder, name)
    folder.mkdir()
    job_file, result_file = folder / "job.json", folder / "result.json"
    job_file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, folder=str(folder)))))
    process = [sys.executable, "-m", "bench.trainers.process", name, str(job_file), str(result_file)]
    done = subprocess.run(process, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    shutil.rmtree(folder / "run", ignore_errors=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return {"skipped": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(result_file.read_text())
    counted = result["steps"][1:]
    seconds = {phase: statistics.median(step.get(phase, 0.0) for step in counted) for phase in ("total", *PHASES)}
    tokens = job.prompts * job.new_tokens
    return {"seconds": seconds, "sampled_tokens_per_second": tokens / seconds["total"], **result}


def _show(results: dict[str, dict[str, Any]]) -> None:
    """Ratios are to the first trainer that ran."""
    base = next((result["seconds"]["total"] for result in results.values() if "seconds" in result), 1.0)
    for name, result in results.items():
        if "skipped" in result:
            print(f"{name}: skipped: {result['skipped']}")
            continue
        seconds = result["seconds"]
        phases = ", ".join(f"{phase} {seconds[phase]:.2f}" for phase in PHASES)
        print(
            f"{name}: {seconds['total']:.2f} s per step ({phases}), {seconds['total'] / base:.2f} times the first, "
            f"{result['sampled_tokens_per_second']:,.0f} sampled tokens/s, peak {result['peak_memory_mb']:,.0f} MB"
        )


def _make_pair(folder: Path, size: Size) -> None:
    tokenizer = _tokenizer(size.vocabulary)
    torch.manual_seed(0)
    model = _llama(size)
    for name in ("teacher", "student"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=NOISE * float(parameter.std(correction=0)))
    rng = random.Random(0)
    texts = (" ".join(f"w{rng.randrange(size.vocabulary - 2)}" for _ in range(rng.randint(8, 32))) for _ in range(1000))
    lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
    (folder / "prompts.jsonl").write_text("".join(lines))


def _llama(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = size.hidden // 64
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(SPREAD)
    return model


def _tokenizer(vocabulary: int) -> Any:
    """One token a word: w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unk>", *(f"w{index}" for index in range(vocabulary - 2))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>", pad_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer
