"""Tiny models, tokenizers, data and configs for the trainer's tests: real Transformers objects, random weights."""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastkl import cli
from fastkl.trainer.commands import command_line as commands
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler

REPOSITORY = Path(__file__).resolve().parents[2]
CHARACTERS = "0123456789+-=abcdefghijklmnopqrstuvwxyz .?!"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer(characters: str = CHARACTERS, **special: str) -> PreTrainedTokenizerFast:
    """One token per character, an end token and three roles."""
    words = ["<eos>", "<unk>", "<u>", "<s>", "<a>", *characters]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<eos>|<u>|<s>|<a>|."), "isolated")
    core.decoder = decoders.Fuse()
    names = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<eos>", **special}
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def llama(vocabulary: int, *, layers: int = 1, width: int = 16, seed: int = 0, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    values = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(values | settings)))


def causal_lm(kind: str = "llama", attention: str = "sdpa", seed: int = 0, **settings: object) -> PreTrainedModel:
    """A random model of a family, with weights large enough that its distributions are far from flat."""
    torch.manual_seed(seed)
    values: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind in ("qwen3", "gemma2", "gemma3_text"):
        values["head_dim"] = 16
    if kind in ("gemma2", "gemma3_text", "mistral"):
        values["sliding_window"] = 8
    if kind == "gemma3_text":
        values["layer_types"] = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(kind, **(values | settings))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def save_model(folder: Path, words: PreTrainedTokenizerFast | None = None, **settings: Any) -> Path:
    """A model folder with its tokenizer. `vocabulary` pads the head beyond the tokenizer's ids."""
    words = tokenizer() if words is None else words
    llama(settings.pop("vocabulary", len(words)), **settings).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sums(count: int = 12) -> list[dict[str, object]]:
    """Prompts of different lengths, with an answer and a completion each."""
    return [
        {"prompt": f"{i}+{i * i}=", "answer": str(i + i * i), "completion": f"{i + i * i}"} for i in range(1, count + 1)
    ]


def model_and_sums(folder: Path, name: str, **settings: Any) -> Path:
    """A folder with a model called `name` and a dozen sums to complete."""
    save_model(folder / name, **settings)
    write_jsonl(folder / "sums.jsonl", sums())
    return folder


def pair_and_sums(folder: Path, **student: Any) -> Path:
    """A folder with a student, a teacher and a dozen sums."""
    save_model(folder / "teacher", seed=1)
    return model_and_sums(folder, "student", **student)


def arguments(command: str, settings: Mapping[str, object]) -> list[str]:
    """A command line: `{"optim.lr": 0.1}` becomes `--optim.lr=0.1`."""
    return [command, *(f"--{name}={json.dumps(v) if isinstance(v, list) else v}" for name, v in settings.items())]


def config(command: str, settings: Mapping[str, object]) -> Any:
    """The config that a command line stands for; the same door as a user's."""
    return commands.parse(arguments(command, settings))[1]


def training(run: Path, student: Path, data: Path, **overrides: object) -> dict[str, object]:
    """Settings of a short run; `optim__lr=1` sets optim.lr."""
    settings: dict[str, object] = {
        "run": run,
        "student.path": student,
        "data.path": data,
        "optim.lr": 0.01,
        "optim.steps": 3,
        "log_samples": 1000,
    }
    return settings | _dotted(overrides)


def distillation(run: Path, student: Path, teacher: Path, data: Path, **overrides: object) -> dict[str, object]:
    small = {"teacher.path": teacher, "sampling.prompts_per_step": 6, "sampling.max_new_tokens": 8}
    return training(run, student, data, **overrides) | small | _dotted(overrides)


def pair_distillation(folder: Path, run: Path, **overrides: object) -> dict[str, object]:
    """Settings of a run with what `pair_and_sums` made."""
    return distillation(run, folder / "student", folder / "teacher", folder / "sums.jsonl", **overrides)


def _dotted(overrides: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("__", "."): value for name, value in overrides.items()}


def run_python(code: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with `code`; stdout and stderr come back as text."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        **options,
    )


def die_at(command_line: list[str], target: str, call: int, after: bool) -> None:
    """Runs a command, and kills the process with SIGKILL before or after so-many-th call of `module:function`."""
    torch.set_num_threads(1)
    module, _, name = target.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == call
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)
    cli.main(command_line)


def together(
    command_line: list[str],
    errors: Path,
    *,
    count: int = 2,
    fsdp: bool = False,
    before: Mapping[int, Callable[[], None]] | None = None,
    timeout: float = 240,
) -> tuple[list[int | None], list[str]]:
    """A command in several processes as a launcher starts them: their exit statuses and what each said on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    errors.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastkl.trainer.distill", "fastkl.trainer.sft", "fastkl.cli"])
    running = []
    for rank in range(count):
        environment = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            **(FSDP if fsdp else {}),
        }
        first = (before or {}).get(rank)
        process = context.Process(target=_join, args=(command_line, environment, errors / f"{rank}.txt", first))
        process.start()
        running.append(process)
    for process in running:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in running], [(errors / f"{rank}.txt").read_text() for rank in range(count)]


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as `accelerate launch` has it
}


def _join(command_line: list[str], environment: dict[str, str], errors: Path, first: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if first is not None:
        first()
    sys.exit(cli.main(command_line))


def give_samples() -> None:
    """From here on, completions depend on their prompt alone; greedy ones are still the model's."""
    for engine in (ContinuousBatchingSampler, GenerateSampler):
        engine.sample = _given(engine.sample)  # type: ignore[method-assign]


def _given(sample: Callable[..., list[Completion]]) -> Any:
    def given(self: Any, prompts: list[list[int]], *, temperature: float, max_new_tokens: int, seed: int) -> Any:
        if temperature == 0:
            return sample(self, prompts, temperature=0, max_new_tokens=max_new_tokens, seed=seed)
        found = []
        for prompt in prompts:
            random = torch.Generator().manual_seed(sum(prompt))
            length = 1 + sum(prompt) % max_new_tokens
            ids = torch.randint(1, len(CHARACTERS), (length,), generator=random).tolist()
            logprobs = (-3 - torch.rand(length, generator=random)).tolist()
            found.append(Completion(ids, logprobs, truncated=length == max_new_tokens))
        return found

    return given


def killed(command_line: list[str], target: str, call: int, after: bool) -> bool:
    """Whether `die_at`, in a process of its own, came to its end by the signal."""
    # A server that has imported everything forks the processes: each starts in no time, and from a clean state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastkl.trainer.distill", "fastkl.cli"])
    process = context.Process(target=die_at, args=(command_line, target, call, after))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL
