"""Prompts and examples: reading them, encoding them, and which of them a step gets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """One row of the data."""

    source: str  # where it stands, for messages: "train.jsonl:17"
    prompt: str | list[dict[str, Any]]  # text, or the messages of a chat
    answer: str | None = None
    completion: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # what else a verifier of the answer needs


@dataclass(frozen=True)
class EncodedPrompt:
    """A row of a data set as token ids, ready for the completion."""

    row: Prompt
    ids: list[int]
    index: int = 0  # among the rows of the run's data; of several data sets, all of them end to end
    dataset: str = ""  # which data set of a mixture


def load_prompts(config: DataConfig) -> list[Prompt]:
    """The rows of a JSONL file or of a data set, each checked; an error names the line."""
    rows = _jsonl_rows(Path(config.path)) if config.path is not None else _dataset_rows(config)
    prompts = []
    for source, row in rows:
        prompts.append(_parse(source, row))
        if config.limit is not None and len(prompts) == config.limit:
            break
    if not prompts:
        raise ConfigError(f"{config.path or config.dataset} holds no rows")
    return prompts


def encode_prompts(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, dataset: str = "", first: int = 0
) -> list[EncodedPrompt]:
    """Prompts as token ids, without those longer than `max_prompt_tokens`; `first` is the index of the first one."""
    encoded = list(zip(prompts, prompt_ids(prompts, tokenizer, config.chat_template), strict=True))
    if config.max_prompt_tokens is not None:
        encoded = [(row, ids) for row, ids in encoded if len(ids) <= config.max_prompt_tokens]
        if not encoded:
            raise ConfigError(
                f"data.max_prompt_tokens is {config.max_prompt_tokens}, and none of the {len(prompts)} prompts of "
                f"{config.path or config.dataset} is as short as that"
            )
    return [EncodedPrompt(row, ids, index, dataset) for index, (row, ids) in enumerate(encoded, start=first)]


def encode_completions(prompts: Sequence[EncodedPrompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the given completions, each with its end of sequence."""
    texts = []
    for prompt in prompts:
        if prompt.row.completion is None:
            raise ConfigError(f"{prompt.row.source}: no `completion`; each row needs one here")
        texts.append(prompt.row.completion)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    completions = [[*ids, *end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    for prompt, completion in zip(prompts, completions, strict=True):
        if not completion:
            raise ConfigError(f"{prompt.row.source}: `completion` has no tokens; take the row out")
    return completions


def prompt_ids(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> list[list[int]]:
    """Token ids of prompts: messages go through the chat template, and so does text, as a user's turn, if asked for.

    A template writes its special tokens itself; to plain text the tokenizer adds its own (a BOS, say).
    """
    plain = {i: row.prompt for i, row in enumerate(prompts) if isinstance(row.prompt, str) and not chat_template}
    chats = {i: render_chat(row, tokenizer) for i, row in enumerate(prompts) if i not in plain}
    ids: dict[int, list[int]] = {}
    for texts, add_special_tokens in ((plain, True), (chats, False)):
        if texts:
            encoded = tokenizer(list(texts.values()), add_special_tokens=add_special_tokens)["input_ids"]
            ids.update(zip(texts, encoded, strict=True))
    return [list(ids[i]) for i in range(len(prompts))]


def render_chat(row: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt in the tokenizer's chat format, up to where the answer begins."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{row.source}: the tokenizer has no chat template; set data.chat_template to false and give text prompts"
        )
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text


def given_samples(prompts: list[EncodedPrompt], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """The data's own completions as samples, in the order of the rows."""
    pairs = zip(prompts, encode_completions(prompts, tokenizer), strict=True)
    return [make_sample(prompt.ids, ids, prompt.index, dataset=prompt.dataset) for prompt, ids in pairs]


def batch_indices(rows: int, per_step: int, step: int, seed: int) -> list[int]:
    """The rows of a step: consecutive places of an endless sequence of permutations.

    A pure function, so a resumed run needs no cursor. Every row comes once before any comes twice.
    """
    return rows_at(rows, range(step * per_step, (step + 1) * per_step), seed)


def rows_at(rows: int, places: range, seed: int) -> list[int]:
    """What stands in these places of an endless sequence of permutations of the rows."""
    permutations = {epoch: _permutation(rows, epoch, seed) for epoch in {place // rows for place in places}}
    return [permutations[place // rows][place % rows] for place in places]


def _permutation(rows: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"data file {path} does not exist (looked in {Path.cwd()})")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}:{number} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number} is not a JSON object: {error.msg} at column {error.colno}") from error
        except (RecursionError, ValueError) as error:  # brackets or digits without end
            raise ConfigError(f"{path}:{number} cannot be read as JSON: {error}") from error


def _dataset_rows(config: DataConfig) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.dataset is {config.dataset!r}, which needs the package `datasets`: pip install datasets, or give "
            f"data.path, a JSONL file"
        ) from error
    for number, row in enumerate(datasets.load_dataset(config.dataset, split=config.split), start=1):
        yield f"{config.dataset}[{config.split}]:{number}", row


def _parse(source: str, row: Any) -> Prompt:
    if not isinstance(row, dict):
        raise ConfigError(f"{source} is a {type(row).__name__}; expected an object with `prompt` or `messages`")
    text, messages = row.get("prompt"), row.get("messages")
    if (text is None) == (messages is None):
        raise ConfigError(f"{source} must have exactly one of `prompt` and `messages`; it has {sorted(row)}")
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{source}: `prompt` is a {type(text).__name__}; expected text (a chat goes into `messages`)")
    if messages is not None and not _are_messages(messages):
        raise ConfigError(f"{source}: `messages` must be a list of objects with `role` and `content`")
    answer, completion = row.get("answer"), row.get("completion")
    if completion is not None and not isinstance(completion, str):
        raise ConfigError(f"{source}: `completion` is a {type(completion).__name__}; expected text")
    if isinstance(answer, (dict, list)):
        raise ConfigError(f"{source}: `answer` is a {type(answer).__name__}; expected text or a number")
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ConfigError(f"{source}: `metadata` is a {type(metadata).__name__}; expected an object")
    prompt: Any = messages if text is None else text
    _check_encodable(source, {"prompt": text, "messages": messages, "completion": completion})
    return Prompt(source, prompt, None if answer is None else str(answer), completion, metadata)


def _check_encodable(source: str, fields: dict[str, Any]) -> None:
    """JSON can spell half of a surrogate pair, which is no text and which no tokenizer takes."""
    for name, value in fields.items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(f"{source}: `{name}` holds half of a surrogate pair ({error.reason})") from error


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, Sequence)
        and len(messages) > 0
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in messages)
    )
