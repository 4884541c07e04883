"""One row of the data: what it may hold, and what it comes to."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkl.trainer.config.data import COLUMNS
from fastkl.trainer.data.turns import Turn, make_turn, read_turns
from fastkl.trainer.errors import ConfigError

FOREIGN = ("conversations", "conversation", "dialog", "chosen")  # where other formats keep a chat
NO_COLUMNS: Mapping[str, Any] = {}  # one for all rows: a dict of their own would be 64 bytes each


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the data."""

    source: str  # where it stands, for messages: "train.jsonl:17"
    prompt: str | list[Turn]  # text, or the messages of a chat, up to the one that is to be answered
    answer: str | None = None
    completion: str | None = None
    truncated: bool = False  # the completion reached a length limit: it has no end
    metadata: dict[str, Any] = field(default_factory=dict)  # what else a verifier of the answer needs
    tools: list[dict[str, Any]] | None = None  # JSON schemas of functions, for the chat template
    reply: Turn | None = None  # the completion as an assistant's turn, where it is more than its text
    more: Mapping[str, Any] = field(default_factory=lambda: NO_COLUMNS)  # the other columns that were asked for

    @property
    def turns(self) -> list[Turn]:
        """The chat; of a text, the user's turn that it makes."""
        return [make_turn("user", self.prompt)] if isinstance(self.prompt, str) else self.prompt

    @property
    def reply_turn(self) -> Turn:
        """The completion as an assistant's turn."""
        return self.reply or make_turn("assistant", self.completion or "")


def parse_row(source: str, row: Any, more: Collection[str] = ()) -> Prompt:
    """A row of a file or data set, checked; an error names it by its `source`. Columns in `more` are kept as they are."""
    if not isinstance(row, dict):
        raise ConfigError(f"{source} is a {type(row).__name__}; expected an object with `prompt` or `messages`")
    check_encodable(source, row, [*COLUMNS, *more])
    prompt, reply = _prompt(source, row)
    completion = _completion(source, row.get("completion"))
    if reply is not None and completion is not None:
        raise ConfigError(
            f"{source} has a `completion` and an assistant's turn at the end of the chat; leave one of them out"
        )
    reply = reply or completion
    answer, metadata = row.get("answer"), row.get("metadata") or {}
    if isinstance(answer, (dict, list)):
        raise ConfigError(f"{source}: `answer` is a {type(answer).__name__}; expected text or a number")
    if not isinstance(metadata, dict):
        raise ConfigError(f"{source}: `metadata` is a {type(metadata).__name__}; expected an object")
    return Prompt(
        source,
        prompt,
        answer=None if answer is None else str(answer),
        completion=None if reply is None else reply["content"],
        truncated=row.get("truncated") is True,
        metadata=metadata,
        tools=_tools(source, row.get("tools")),
        reply=reply if reply is not None and len(reply) > 2 else None,
        more={name: row[name] for name in more if row.get(name) is not None and name not in COLUMNS} or NO_COLUMNS,
    )


def _prompt(source: str, row: Mapping[str, Any]) -> tuple[str | list[Turn], Turn | None]:
    """Text or a chat; and the assistant's turn that the chat ends with."""
    text, messages = row.get("prompt"), row.get("messages")
    if (text is None) == (messages is None):
        raise ConfigError(
            f"{source} must have exactly one of `prompt` and `messages`; it has {sorted(row)}{_hint(row)}"
        )
    if isinstance(text, str):
        if _is_chat(text):
            raise ConfigError(f"{source}: `prompt` is JSON text of messages; give the list itself, as `messages`")
        return text, None
    name, chat = ("messages", messages) if text is None else ("prompt", text)
    if text is not None and not isinstance(text, Sequence):
        raise ConfigError(f"{source}: `prompt` is a {type(text).__name__}; expected text or a list of messages")
    turns = read_turns(source, name, chat)
    reply = turns.pop() if turns[-1]["role"] == "assistant" else None
    if not any(turn["role"] == "user" for turn in turns):
        raise ConfigError(
            f"{source}: `{name}` has no turn of a user to answer; it has the roles {_roles(turns, reply)}"
        )
    if turns[-1]["role"] == "assistant":
        raise ConfigError(f"{source}: `{name}` ends with two turns of the assistant; make them one")
    return turns, reply


def _is_chat(text: str) -> bool:
    try:
        turns = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(turns, list)
        and turns != []
        and all(isinstance(turn, dict) and {"role", "content"} <= {*turn} for turn in turns)
    )


def _completion(source: str, value: Any) -> Turn | None:
    """Text, or a list of the one assistant's turn."""
    if value is None:
        return None
    if isinstance(value, str):
        return make_turn("assistant", value)
    if not isinstance(value, list):
        raise ConfigError(f"{source}: `completion` is a {type(value).__name__}; expected text or one assistant's turn")
    turns = read_turns(source, "completion", value)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise ConfigError(
            f"{source}: `completion` has turns of {_roles(turns)}; expected one of the assistant. Earlier turns go into "
            f"`messages`"
        )
    return turns[0]


def _tools(source: str, value: Any) -> list[dict[str, Any]] | None:
    """Schemas; also as JSON text, as tables often hold them."""
    tools = _from_json(source, value)
    if isinstance(tools, list):
        tools = [_from_json(source, tool) for tool in tools]
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{source}: `tools` must be a list of JSON schemas (objects), or JSON text of one")
    return tools


def _from_json(source: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: `tools` is text that is no JSON ({error})") from error


def check_encodable(source: str, row: Mapping[str, Any], names: Iterable[str]) -> None:
    """JSON can spell half of a surrogate pair, which is no text and which no tokenizer takes and no file holds."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        try:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(f"{source}: `{name}` holds half of a surrogate pair ({error.reason})") from error


def _hint(row: Mapping[str, Any]) -> str:
    found = [name for name in FOREIGN if name in row]
    if not found and not {"prompt", "messages"} & {*row}:
        return ". data.columns reads one under another name, as {prompt: question} does"
    if not found:
        return ""
    return f". Rename `{found[0]}` to `messages`, or set data.columns to {{messages: {found[0]}}}"


def _roles(turns: Sequence[Turn], *more: Turn | None) -> str:
    return ", ".join(repr(turn["role"]) for turn in (*turns, *more) if turn is not None)
