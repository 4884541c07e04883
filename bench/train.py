"""`fastkl distill` on a pair of models: tokens per second and peak memory.

    python -m bench train --device cuda --json train.json
    python -m bench train --pair runs/smollm2 --json train.json        teacher/, student/ and prompts.jsonl are there

Without --pair one is generated: a random Llama with a vocabulary of Qwen3's size as the teacher, the same with noise on its
weights as the student, and prompts of random words. The speed is that of a real run; what is learned means nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.machine import describe_machine, describe_versions


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
    parser.add_argument("--pair", type=Path, metavar="FOLDER", help="teacher/, student/ and prompts.jsonl")
    parser.add_argument("--small", action="store_true", help="a tiny pair and a short run, for a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here; use --device cpu")
    size = SIZES["small" if arguments.small else "full"]
    with tempfile.TemporaryDirectory() as folder:
        pair = arguments.pair
        if pair is None:
            pair = Path(folder) / "pair"
            _make_pair(pair, size)
        run_folder = Path(folder) / "run"
        status = _distill(pair, run_folder, size, arguments.device)
        if status != 0:
            sys.exit(status)
        steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    report = _report(steps, arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    memory = f"peak {report['peak_memory_mb']:,.0f} MB"
    print(f"{report['tokens_per_second']:,.0f} tokens/s, {memory}, {report['pair']} pair, {len(steps)} steps")


def _distill(pair: Path, run_folder: Path, size: Size, device: str) -> int:
    """The command, in this process, so that its memory can be read."""
    from fastkl import cli

    settings: dict[str, Any] = {
        "run": run_folder,
        "student.path": pair / "student",
        "teacher.path": pair / "teacher",
        "data.path": pair / "prompts.jsonl",
        "sampling.prompts_per_step": size.prompts,
        "sampling.max_new_tokens": size.new_tokens,
        "optim.steps": size.steps,
        "optim.lr": 1e-5,
        "mixed_precision": "bf16" if device == "cuda" else "no",
        "checkpoint.every": 0,
    }
    return cli.main(["distill", *(f"--{name}={value}" for name, value in settings.items())])


def _report(steps: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens (prompt and completion) over the seconds of a step: the median of those after the first, which warms up."""
    on_gpu = arguments.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps[1:] or steps),
        "peak_memory_mb": peak / 1e6,  # of the device; on a CPU of the process
        "steps": steps,
        "pair": "generated" if arguments.pair is None else str(arguments.pair),
        "machine": describe_machine(arguments.device),
        "versions": describe_versions("transformers", "accelerate"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


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
