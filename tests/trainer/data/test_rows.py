"""What a row may hold, and what is refused: the message names the row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastkl.trainer.data.rows import Prompt, parse_row
from fastkl.trainer.errors import ConfigError

Row = dict[str, Any]

USER = {"role": "user", "content": "q"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def turn(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def chat(*turns: Row, **columns: Any) -> Row:
    return {"messages": [*turns], **columns}


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}, {"text": "c"}, "d"]
    for role in ("user", "system", "tool"):
        row = parse_row("d:1", chat(USER, turn(role, parts)))
        assert row.prompt == [USER, turn(role, "a bcd")]
    assert parse_row("d:1", chat(USER, turn("assistant", parts))).completion == "a bcd"


@pytest.mark.parametrize(
    ("last", "completion"),
    [
        (chat(USER, turn("assistant", "4")), "4"),
        ({"prompt": [USER, turn("assistant", "4")]}, "4"),
        ({"prompt": [USER], "completion": [turn("assistant", "4")]}, "4"),
        ({"prompt": [USER], "completion": "4"}, "4"),
        (chat(USER, completion="4"), "4"),
        (chat(USER), None),
        (chat(USER, turn("assistant", "4", tool_calls=None, name=None)), "4"),
    ],
)
def test_the_last_turn_of_the_assistant_is_the_completion(last: Row, completion: str | None) -> None:
    row = parse_row("d:1", last)
    assert (row.prompt, row.completion, row.reply) == ([USER], completion, None)


def test_a_completion_that_is_more_than_text_stays_a_turn() -> None:
    calls = turn("assistant", None, tool_calls=[CALL])
    row = parse_row("d:1", chat(USER, calls, tools=TOOLS))
    assert (row.completion, row.reply) == ("", turn("assistant", "", tool_calls=[CALL]))
    row = parse_row("d:1", {"prompt": "q", "completion": [turn("assistant", "4", reasoning_content="hmm")]})
    assert (row.completion, row.reply) == ("4", turn("assistant", "4", reasoning_content="hmm"))
    earlier = chat(USER, calls, turn("tool", "7"), turn("user", "and?"))
    assert parse_row("d:1", earlier).turns[1] == turn("assistant", "", tool_calls=[CALL])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", ""), ("[1]", "[1]"), ("{a: 1}", "{a: 1}"), (None, None)],
)
def test_arguments_of_a_call_are_an_object(given: Any, wanted: Any) -> None:
    """Also where they are JSON text of one, in each form of a call."""
    forms: list[Row] = [
        {"tool_calls": [{"function": {"name": "f", "arguments": given}}, {"name": "g", "arguments": given}]},
        {"function_call": {"name": "f", "arguments": given}},
    ]
    for form in forms:
        turns = parse_row("d:1", chat(USER, turn("assistant", None, **form), USER)).turns
        assert turns[1] == json.loads(
            json.dumps(turn("assistant", "", **form)).replace(json.dumps(given), json.dumps(wanted))
        )


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]], ids=["list", "text", "texts"])
def test_tools_are_schemas_or_their_json(tools: Any) -> None:
    assert parse_row("d:1", {"prompt": "q", "tools": tools}).tools == TOOLS


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools(tools: Any) -> None:
    assert parse_row("d:1", {"prompt": "q", "tools": tools}) == Prompt("d:1", "q")


BAD = {
    "image": (chat(turn("user", [{"type": "image_url", "image_url": {}}])), "turn 1 (user)", "type 'image_url'"),
    "audio": (chat(USER, turn("tool", [{"type": "input_audio"}])), "turn 2 (tool)", "type 'input_audio'"),
    "text-part-without-text": (chat(turn("user", [{"type": "text"}])), "turn 1 (user)", "without `text`"),
    "number-as-part": (chat(turn("user", [1])), "turn 1 (user)", "a part that is a int"),
    "no-parts": (chat(turn("user", [])), "turn 1 (user)", "`content` is []"),
    "number-as-content": (chat(turn("user", 3)), "turn 1 (user)", "`content` is 3"),
    "object-as-content": (chat(turn("user", {"text": "a"})), "turn 1 (user)", "`content` is {'text': 'a'}"),
    "null-of-a-user": (chat(turn("user", None)), "turn 1 (user)", "has no `content`"),
    "null-of-a-system": (chat(turn("system", None), USER), "turn 1 (system)", "has no `content`"),
    "null-of-a-tool": (chat(USER, turn("tool", None)), "turn 2 (tool)", "has no `content`"),
    "null-of-an-assistant": (chat(USER, turn("assistant", None)), "turn 2 (assistant)", "has no `content`"),
    "null-without-calls": (chat(USER, turn("assistant", None, tool_calls=[])), "turn 2 (assistant)", "no `content`"),
    "two-completions": (chat(USER, turn("assistant", "4"), completion="5"), "`completion` and an assistant's turn", ""),
    "two-completions-in-prompt": (
        {"prompt": [USER, turn("assistant", "4")], "completion": [turn("assistant", "5")]},
        "`completion` and an assistant's turn",
        "",
    ),
    "only-an-assistant": (chat(turn("assistant", "4")), "no turn of a user", "'assistant'"),
    "only-a-system": (chat(turn("system", "s")), "no turn of a user", "'system'"),
    "human": (chat(turn("human", "q")), "turn 1 of `messages` has the role 'human'", "rename it to user"),
    "model": (chat(USER, turn("model", "4")), "turn 2 of `messages` has the role 'model'", "rename it to assistant"),
    "gpt": ({"prompt": [USER, turn("gpt", "4")]}, "turn 2 of `prompt` has the role 'gpt'", "rename it to assistant"),
    "capital": (chat(USER, turn("Assistant", "4")), "the role 'Assistant'", "rename it to assistant"),
    "bot-as-completion": ({"prompt": "q", "completion": [turn("bot", "4")]}, "of `completion`", "to assistant"),
    "earlier-ai": (chat(USER, turn("ai ", "4"), USER), "the role 'ai '", "rename it to assistant"),
    "ipython": (chat(USER, turn("ipython", "4")), "the role 'ipython'", "rename it to tool"),
    "unknown-role": (
        chat(USER, turn("critic", "4")),
        "'critic'",
        "rename it to one of system, developer, user, assistant",
    ),
    "two-answers": (chat(USER, turn("assistant", "4"), turn("assistant", "5")), "two turns of the assistant", ""),
    "user-as-completion": ({"prompt": "q", "completion": [USER]}, "`completion` has turns of 'user'", "expected one"),
    "turns-as-completion": (
        {"prompt": "q", "completion": [turn("assistant", "4"), USER, turn("assistant", "5")]},
        "`completion` has turns of 'assistant', 'user', 'assistant'",
        "Earlier turns go into `messages`",
    ),
    "no-turns-as-completion": ({"prompt": "q", "completion": []}, "`completion` must be a list", "empty"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}]}, "Rename `conversations`", "{messages: conv"),
    "sharegpt-renamed": (chat({"from": "human", "value": "q"}), "`from` and `value`: rename them", "human and gpt"),
    "text-as-tools": ({"prompt": "q", "tools": "add"}, "`tools` is text that is no JSON", ""),
    "names-as-tools": ({"prompt": "q", "tools": [1]}, "`tools` must be a list of JSON schemas", ""),
    "chat-as-text": ({"prompt": json.dumps([USER])}, "`prompt` is JSON text of messages", "as `messages`"),
    "half-a-surrogate-in-an-answer": ({"prompt": "q", "answer": "\ud800"}, "`answer` holds half of a surrogate", ""),
    "half-a-surrogate-in-metadata": ({"prompt": "q", "metadata": {"a": "\ud800"}}, "`metadata` holds half", ""),
}


@pytest.mark.parametrize(("row", "message", "more"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_by_name(row: Row, message: str, more: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_row("d.jsonl:7", row)
    assert str(error.value).startswith("d.jsonl:7")
    assert message in str(error.value)
    assert more in str(error.value)
