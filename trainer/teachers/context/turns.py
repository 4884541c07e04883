"""From a row to what its teacher is asked, as `ContextConfig` says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastkl.trainer.config.context import ContextConfig, ExamplesConfig
from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.data.turns import Turn, make_turn, read_turns
from fastkl.trainer.errors import ConfigError, require

FIRST = ("system", "developer")  # roles of the turns that stand before all others
Content = str | list[Turn]  # a text of its own, or the turns of a chat


def teacher_content(prompt: EncodedPrompt, config: ContextConfig, examples: Sequence[Turn], setting: str) -> Content:
    """What the teacher is asked instead of a prompt; `setting` is the name of `config`, for messages.

    Raises:
        ConfigError: Naming the row, where it lacks what the config names.
    """
    row = prompt.row
    if prompt.chat is None:
        _check_text(row, config, setting)
        return str(row.prompt) if config.template is None else _filled(row, config, setting)
    turns = row.turns
    if config.messages is not None:
        turns = read_chat(row.source, config.messages, _field(row, config.messages, f"{setting}.messages"))
    if config.template is not None:
        turns = asking(turns, _filled(row, config, setting))
    first = next((place for place, turn in enumerate(turns) if turn["role"] not in FIRST), len(turns))
    return [*_system(turns[:first], config.system), *examples, *turns[first:]]


def question(row: Prompt) -> str:
    """The last user turn."""
    return str(row.turns[_last_user(row.turns)]["content"])


def asking(turns: Sequence[Turn], text: str) -> list[Turn]:
    """The turns with this text as the last user turn."""
    last = _last_user(turns)
    return [*turns[:last], turns[last] | {"content": text}, *turns[last + 1 :]]


def read_chat(source: str, name: str, value: Any) -> list[Turn]:
    """The turns of a chat that is to be answered."""
    turns = read_turns(source, name, value)
    if turns[-1]["role"] == "assistant":
        raise ConfigError(f"{source}: `{name}` ends with a turn of the assistant; end it with the one that is answered")
    return turns


def read_examples(config: ExamplesConfig, setting: str) -> list[Turn]:
    """The turns of solved examples, question by answer; `setting` is the name of `config`."""
    if config.path is None:
        return []
    rows = load_prompts(DataConfig(path=config.path, limit=config.count))
    require(
        config.count is None or len(rows) == config.count,
        f"{setting}.count is {config.count}, but {config.path} has {len(rows)} rows; lower it",
    )
    turns: list[Turn] = []
    for row in rows:
        require(row.completion is not None, f"{row.source}: no `completion`; each row of {setting}.path needs one")
        require(
            row.turns[0]["role"] not in FIRST and row.tools is None,
            f"{row.source} has a turn of the role {row.turns[0]['role']!r} at the beginning, or `tools`, and an example "
            f"stands inside a chat that has its own; take them out, and write the text into the context's system",
        )
        turns += [*row.turns, row.reply_turn]
    return turns


def _check_text(row: Prompt, config: ContextConfig, setting: str) -> None:
    """A prompt that is a text has no turns for these to go into."""
    parts = {"system": config.system, "messages": config.messages, "examples": config.examples.path}
    for name in (name for name, value in parts.items() if value is not None):
        raise ConfigError(
            f"{setting}.{name} is set, but {row.source} is a text and no chat (data.chat_template is false): it has no "
            f"turns. Write all of the teacher's text into {setting}.template, with {{prompt}} at its end, or set "
            f"data.chat_template to true"
        )


def _filled(row: Prompt, config: ContextConfig, setting: str) -> str:
    """The template with the row's fields."""
    fields = {name: _text(_field(row, name, f"{setting}.template")) for name in config.template_fields}
    return str(config.template).format(**fields)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _field(row: Prompt, name: str, setting: str) -> Any:
    """What a name in `setting` stands for; a column goes before a key of the metadata."""
    own = {"prompt": question(row), "answer": row.answer, "completion": row.completion}
    found = {key: value for key, value in {**row.metadata, **row.more, **own}.items() if value is not None}
    if name not in found:
        has = ", ".join(f"`{known}`" for known in found)
        raise ConfigError(
            f"{row.source} lacks `{name}`, which {setting} names; it has {has}. Give it one, or take the row out"
        )
    return found[name]


def _last_user(turns: Sequence[Turn]) -> int:
    return max(place for place, turn in enumerate(turns) if turn["role"] == "user")


def _system(turns: list[Turn], text: str | None) -> list[Turn]:
    """The turns before all others, with the text in the first of them."""
    if text is None:
        return turns
    if not turns:
        return [make_turn("system", text)]
    return [turns[0] | {"content": f"{text}\n\n{turns[0]['content']}"}, *turns[1:]]
