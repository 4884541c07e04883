"""The messages of a chat, as rows hold them: roles, and contents that become text."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastkl.trainer.errors import ConfigError

Turn = dict[str, Any]  # `role`, `content` (text), and what else the template may read: tool_calls, name, …

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What other formats call them.
OTHER_NAMES = {
    "assistant": ("ai", "answer", "bot", "chatbot", "chatgpt", "claude", "gpt", "llm", "model", "output", "response"),
    "user": ("customer", "human", "input", "instruction", "prompter", "question"),
    "system": ("context", "instructions"),
    "tool": ("environment", "ipython", "observation", "tool_response", "tool_result"),
}
TEXT_PARTS = ("text", "input_text", "output_text")
CALLS = ("tool_calls", "function_call")  # the second by the older form
REASONING = ("reasoning_content", "reasoning", "thinking")  # where a turn keeps it
_THINKING = re.compile(r"</?think>")  # templates take a content apart here


def make_turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def read_turns(source: str, name: str, value: Any) -> list[Turn]:
    """The turns of a chat in the column called `name`, with text as content; keys that are null are left out."""
    wanted = f"{source}: `{name}` must be a list of objects with `role` and `content`"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"{wanted}; it is a {type(value).__name__}")
    if not value:
        raise ConfigError(f"{wanted}; it is empty")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise ConfigError(f"{wanted}; turn {number} is a {type(turn).__name__}")
        if "from" in turn and "value" in turn:
            raise ConfigError(
                f"{wanted}; turn {number} has `from` and `value`: rename them, and the roles human and gpt to user and "
                f"assistant"
            )
        if not isinstance(turn.get("role"), str):
            raise ConfigError(f"{wanted}; turn {number} has the role {turn.get('role')!r}")
        if turn["role"] not in ROLES:
            raise ConfigError(
                f"{source}: turn {number} of `{name}` has the role {turn['role']!r}; rename it to {_role(turn['role'])}"
            )
    return [_turn(f"{source}: turn {number} ({turn['role']})", turn) for number, turn in enumerate(value, start=1)]


def _role(name: str) -> str:
    """What a role of another name is to be called."""
    plain = name.strip().lower()
    same = [role for role in ROLES if plain in (role, *OTHER_NAMES.get(role, ()))]
    return same[0] if same else f"one of {', '.join(ROLES)}"


def _turn(place: str, turn: Turn) -> Turn:
    given = {key: value for key, value in turn.items() if value is not None}
    if "content" not in given:
        if turn["role"] == "assistant" and (turn.get("tool_calls") or turn.get("function_call")):
            return _with_calls(given | {"content": ""}, _from_text)  # the calls are what it says
        raise ConfigError(f"{place} has no `content`; give it text, or leave the row out")
    return _with_calls(given | {"content": _text(place, given["content"])}, _from_text)


def calls_as_text(turn: Turn) -> Turn:
    """The turn with the arguments of its calls as JSON text, which some templates want."""
    return _with_calls(
        turn,
        lambda function: (
            function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
            if isinstance(function.get("arguments"), dict)
            else function
        ),
    )


def _from_text(function: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object, where they are JSON text of one."""
    text = function.get("arguments")
    try:
        read = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return function
    return function | {"arguments": read} if isinstance(read, dict) else function


def _with_calls(turn: Turn, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Turn:
    """The turn with each call of a tool changed: `tool_calls`, with or without `function`, and `function_call`."""
    new = dict(turn)
    if isinstance(calls := turn.get("tool_calls"), list):
        new["tool_calls"] = [_changed(call, change) for call in calls]
    if isinstance(call := turn.get("function_call"), dict):
        new["function_call"] = change(call)
    return new


def _changed(call: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if not isinstance(call, dict):
        return call
    return call | {"function": change(call["function"])} if isinstance(call.get("function"), dict) else change(call)


def _text(place: str, content: Any) -> str:
    """A content as it stands, or the text parts of a list end to end."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise ConfigError(f"{place}: `content` is {content!r:.40}; expected text or a list of text parts")
    return "".join(_part(place, part) for part in content)


def _part(place: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ConfigError(f"{place}: `content` has a part that is a {type(part).__name__}; expected text")
    kind, text = part.get("type", "text"), part.get("text")
    if kind not in TEXT_PARTS:
        raise ConfigError(f"{place}: `content` has a part of the type {kind!r}; only text is read, leave the row out")
    if not isinstance(text, str):
        raise ConfigError(f"{place}: `content` has a part of the type {kind!r} without `text`")
    return text


def marked(number: int, turn: Turn) -> Turn:
    """The turn with a text and names of tools that are found again."""
    return with_marked_calls(number, turn | {"content": f"text-{number}-text" if turn["content"] else ""})


def with_marked_calls(number: int, turn: Turn) -> Turn:
    """The turn with names and arguments of its calls that are found again, other ones for each call."""
    marks = (f"{number}_{call}" for call in itertools.count(1))
    return _with_calls(turn, lambda function: _marked_call(next(marks), function))


def _marked_call(mark: str, function: dict[str, Any]) -> dict[str, Any]:
    given, new = function.get("arguments"), dict(function)
    if "name" in function:
        new["name"] = f"call_{mark}_call"
    if isinstance(given, dict):
        new["arguments"] = {key: f"value_{mark}_{index}_value" for index, key in enumerate(given)}
    elif isinstance(given, str) and given:
        new["arguments"] = f"value_{mark}_value"
    return new


def left_out(turn: Turn, text: str) -> str | None:
    """The first part of a turn that is not in a text, white space aside; None where all of it is."""
    dense = "".join(text.split())
    return next((name for name, part in _parts(turn) if "".join(part.split()) not in dense), None)


def _parts(turn: Turn) -> Iterator[tuple[str, str]]:
    yield from (("`content`", part) for part in _THINKING.split(turn["content"]))
    yield from ((f"`{key}`", str(turn[key])) for key in REASONING if key in turn)


def left_out_call(turn: Turn, text: str) -> str | None:
    """As `left_out`, of a turn with marked calls: the first of them that is not in the text, with its arguments."""
    for key in CALLS:
        for number, call in enumerate(calls_of(turn, key), start=1):
            given = call.get("arguments")
            values = list(given.values()) if isinstance(given, dict) else [given] if isinstance(given, str) else []
            if str(call.get("name", "")) not in text:
                return f"`{key}` (call {number})"
            if any(value not in text for value in values):
                return f"`arguments` of `{key}` (call {number})"
    return None


def calls_of(turn: Turn, key: str) -> list[dict[str, Any]]:
    """The calls of tools in a turn, each with `name` and `arguments`."""
    given = turn.get(key)
    calls = given if isinstance(given, list) else [given]
    found = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [call for call in found if isinstance(call, dict)]
