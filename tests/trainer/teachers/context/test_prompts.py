"""What `teacher.context` makes of rows, and rows that it refuses. No model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES, QWEN, family_tokenizer
from context_cases import HERE, asked, prompts_of
from documents import blocks
from launches import REPOSITORY
from run_settings import config, distillation
from tiny_data import write_jsonl
from tiny_models import tokenizer

from fastkl.trainer.commands import command_line as commands
from fastkl.trainer.config.context import ContextConfig
from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.rows import parse_row
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.teachers.context.attempts import Attempt
from fastkl.trainer.teachers.context.functions import context_function

ROW: dict[str, Any] = {"prompt": "1+1=", "answer": "2", "completion": "it is 2", "metadata": {"hint": "add", "n": 3}}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "sum"},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    ],
    "theirs": [{"role": "user", "content": "what is 2+2"}],
}
EXAMPLES = [{"prompt": "0+0", "completion": "0"}, {"prompt": "3+3", "completion": "6"}]

READ: dict[str, tuple[dict[str, Any], dict[str, object], str]] = {
    "system": (ROW, {"system": "in words"}, "<s>in words<u>1+1=<a>"),
    "system-before": (CHAT, {"system": "in words"}, "<s>in words<unk>sum<u>1+1<a>2<u>2+2<a>"),
    "template": (ROW, {"template": "{hint} {n} {answer}. {prompt}"}, "<u>add 3 2. 1+1=<a>"),
    "completion": (ROW, {"template": "{completion}"}, "<u>it is 2<a>"),
    "last-turn": (CHAT, {"template": "{prompt}?"}, "<s>sum<u>1+1<a>2<u>2+2?<a>"),
    "words": (ROW | {"metadata": {"a hint": "add"}}, {"template": "{a hint} {prompt}"}, "<u>add 1+1=<a>"),
    "another-column": (ROW | {"note": "so"}, {"template": "{note} {prompt}"}, "<u>so 1+1=<a>"),
    "column-and-key": (ROW | {"hint": "so"}, {"template": "{hint} {prompt}"}, "<u>so 1+1=<a>"),
    "messages": (CHAT, {"messages": "theirs"}, "<u>what is 2+2<a>"),
    "messages-of-metadata": (
        ROW | {"metadata": {"chat": [{"role": "user", "content": "sum"}]}},
        {"messages": "chat", "system": "say"},
        "<s>say<u>sum<a>",
    ),
    "examples": (CHAT, {"examples.count": 1}, "<s>sum<u>0+0<a>0<u>1+1<a>2<u>2+2<a>"),
    "all-examples": (ROW, {"template": "{prompt}?", "examples.count": "null"}, "<u>0+0<a>0<u>3+3<a>6<u>1+1=?<a>"),
    "function": (ROW, {"function": f"{HERE}.of_row", "trust_context": "true"}, "<u>2 1+1=<a>"),
}


@pytest.mark.parametrize(("row", "context", "text"), READ.values(), ids=READ)
def test_what_the_teacher_reads(tmp_path: Path, row: dict[str, Any], context: dict[str, object], text: str) -> None:
    if "examples.count" in context:
        context = context | {"examples.path": write_jsonl(tmp_path / "examples.jsonl", EXAMPLES)}
    found, read = prompts_of(tmp_path, [row, row], context)
    assert found == [text, text]
    assert [prompt.index for prompt in read.data_sets[0].prompts] == [0, 1]


def test_a_function_that_changes_its_row() -> None:
    """It changes its own copy: the student's row, and what the next call gets, stay as they are."""
    row = parse_row("d.jsonl:1", {"messages": asked("1+1="), "metadata": {"hint": "add"}})
    prompt = EncodedPrompt(row, [], chat=ChatTemplate(tokenizer()))
    function = context_function(ContextConfig(function=f"{HERE}.of_changed", trust_context=True), "teacher.context")
    assert function is not None
    assert [function.of_row(prompt) for _ in range(2)] == [asked("1+1=!")] * 2
    assert (prompt.row.turns, prompt.row.metadata) == (asked("1+1="), {"hint": "add"})


def test_a_text_that_is_no_chat(tmp_path: Path) -> None:
    found, _ = prompts_of(tmp_path, [ROW], {"template": "{{x}} {hint}. {prompt}"}, chat_template="false")
    assert found == ["<unk>x<unk> add. 1+1="]


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_all_habits(tmp_path: Path, name: str) -> None:
    """Of the two prompts, what comes after the question is the same."""
    words = family_tokenizer(name)
    found, read = prompts_of(tmp_path, [ROW], {"template": "{hint}: {prompt}"}, words)
    plain = prompts_of(tmp_path, [ROW], {"template": "{prompt}"}, words)[0]
    assert found[0].replace("add: 1+1=", "1+1=") == plain[0]
    assert read.data_sets[0].prompts[0].row.source.endswith("rows.jsonl:1 with teacher.context")
    refused = {"gemma": "System role not supported", "r1": r"leaves out the `content` of turn 1 \(system\)"}.get(name)
    if refused is not None:
        with pytest.raises(ConfigError, match=rf"rows\.jsonl:1 with teacher\.context: .*{refused}"):
            prompts_of(tmp_path, [ROW], {"system": "in words"}, words)
    else:
        assert "in words" in prompts_of(tmp_path, [ROW], {"system": "in words"}, words)[0][0]


TRUST: dict[str, object] = {"trust_context": "true"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, object], list[str]]] = {
    "field": (ROW, {"template": "{hints}"}, ["rows.jsonl:1 lacks `hints`", "teacher.context.template", "`hint`"]),
    "answer": ({"prompt": "1"}, {"template": "{answer}"}, ["rows.jsonl:1 lacks `answer`", "it has `prompt`"]),
    "column": (ROW, {"messages": "theirs"}, ["rows.jsonl:1 lacks `theirs`", "teacher.context.messages"]),
    "answered": (
        ROW | {"theirs": [*CHAT["theirs"], {"role": "assistant", "content": "4"}]},
        {"messages": "theirs"},
        ["rows.jsonl:1: `theirs` ends with a turn of the assistant"],
    ),
    "no-chat": (ROW | {"theirs": "2+2"}, {"messages": "theirs"}, ["rows.jsonl:1: `theirs` must be a list"]),
    "untrusted": (ROW, {"function": f"{HERE}.of_row"}, ["teacher.context.trust_context to true"]),
    "missing": (ROW, {"function": f"{HERE}.nothing", **TRUST}, ["teacher.context.function", "cannot be imported"]),
    "arguments": (
        ROW,
        {"function": f"{HERE}.of_nothing", **TRUST},
        ["(row) or (row, samples), but takes other arguments"],
    ),
    "either": (ROW, {"function": f"{HERE}.of_either", **TRUST}, ["(row) or (row, samples), but may be called in both"]),
    "half-a-pair": (ROW, {"function": f"{HERE}.of_half", **TRUST}, ["rows.jsonl:1 with teacher.context", "surrogate"]),
    "failing": (
        ROW,
        {"function": f"{HERE}.failing", **TRUST},
        ["rows.jsonl:1: teacher.context.function failed", "hint"],
    ),
    "rows": (
        ROW,
        {"function": f"{HERE}.of_row", "max_tokens": 9, **TRUST},
        ["teacher.context.max_tokens is 9", "which takes (row)"],
    ),
    "few-examples": (ROW, {"examples.count": 3}, ["teacher.context.examples.count is 3", "has 2 rows"]),
}


@pytest.mark.parametrize(("row", "context", "parts"), REFUSED.values(), ids=REFUSED)
def test_refused_rows(tmp_path: Path, row: dict[str, Any], context: dict[str, object], parts: list[str]) -> None:
    if "examples.count" in context:
        context = context | {"examples.path": write_jsonl(tmp_path / "examples.jsonl", EXAMPLES)}
    with pytest.raises(ConfigError) as error:
        prompts_of(tmp_path, [row], context)
    assert [part for part in parts if part not in str(error.value)] == [], error.value


@pytest.mark.parametrize(
    ("example", "part"),
    [
        ({"prompt": "1"}, "examples.jsonl:1: no `completion`"),
        ({"messages": CHAT["messages"], "completion": "4"}, "examples.jsonl:1 has a turn of the role 'system'"),
    ],
    ids=["no-completion", "system"],
)
def test_refused_examples(tmp_path: Path, example: dict[str, Any], part: str) -> None:
    file = write_jsonl(tmp_path / "examples.jsonl", [example])
    with pytest.raises(ConfigError, match=part):
        prompts_of(tmp_path, [ROW], {"examples.path": file})


@pytest.mark.parametrize(
    ("name", "thought"), [("qwen", {"reasoning_content": "add one"}), ("qwen", {}), ("r1", {}), ("smollm", {})]
)
def test_thoughts_of_examples(tmp_path: Path, name: str, thought: dict[str, str]) -> None:
    """A template that drops them from earlier turns would show other examples than those that were written."""
    turn = {"role": "assistant", "content": "2" if thought else "<think>add one</think>2", **thought}
    file = write_jsonl(tmp_path / "examples.jsonl", [{"messages": [*asked("1+1="), turn]}])
    if name == "smollm":
        assert "add one" in prompts_of(tmp_path, [ROW], {"examples.path": file}, family_tokenizer(name))[0][0]
        return
    with pytest.raises(ConfigError, match=r"teacher\.context.*: the chat template leaves .*out "):
        prompts_of(tmp_path, [ROW], {"examples.path": file}, family_tokenizer(name))


@pytest.mark.parametrize("name", ["system", "messages", "examples.path"])
def test_a_text_has_no_turns(tmp_path: Path, name: str) -> None:
    value = write_jsonl(tmp_path / "examples.jsonl", EXAMPLES) if name == "examples.path" else "theirs"
    with pytest.raises(ConfigError) as error:
        prompts_of(tmp_path, [ROW], {name: value}, chat_template="false")
    for part in (
        f"teacher.context.{name.partition('.')[0]} is set",
        "rows.jsonl:1 is a text",
        "teacher.context.template",
    ):
        assert part in str(error.value)


SWITCHED = QWEN.replace("enable_thinking is defined and enable_thinking is false", "'no think' in messages[0].content")


@pytest.mark.parametrize(
    ("first", "context", "tails"),
    [
        ("be kind", {"system": "no think"}, [r"assistant\n'", r"<think>\n\n</think>\n\n'"]),
        ("no think", {"messages": "theirs"}, [r"<think>\n\n</think>\n\n'", r"assistant\n'"]),
    ],
    ids=["teacher", "student"],
)
def test_a_thought_that_is_opened_on_one_side_alone(
    tmp_path: Path, first: str, context: dict[str, object], tails: list[str]
) -> None:
    words = family_tokenizer("qwen", template=SWITCHED)
    turns = [{"role": "system", "content": first}, *CHAT["theirs"]]
    with pytest.raises(ConfigError) as error:
        prompts_of(tmp_path, [{"messages": turns, "theirs": CHAT["theirs"]}], context, words)
    said = str(error.value)
    assert said.index("the student's prompt ends in ") < said.index(tails[0]) < said.rindex(tails[1])
    assert "rows.jsonl:1" in said
    assert "by teacher.context" in said
    both = prompts_of(tmp_path, [{"messages": turns, "theirs": turns}], {"messages": "theirs"}, words)[0]
    assert both[0].endswith("</think>\n\n") == (first == "no think")


def test_a_text_that_ends_otherwise(tmp_path: Path) -> None:
    parts = ["rows.jsonl:1: the student's prompt ends in '1+1='", "in '1+1=2 '", "teacher.context"]
    with pytest.raises(ConfigError) as error:
        prompts_of(tmp_path, [ROW], {"template": "{prompt}{answer} "}, chat_template="false")
    assert [part for part in parts if part not in str(error.value)] == [], error.value


SETTINGS: dict[str, tuple[dict[str, object], str]] = {
    "empty": ({"system": ""}, r"teacher\.context\.system is empty"),
    "two": ({"template": "{prompt}", "messages": "m"}, r"teacher\.context\.template is .* unset one of them"),
    "own": ({"messages": "prompt"}, r"teacher\.context\.messages is 'prompt'"),
    "function": (
        {"function": "a.b", "system": "x"},
        r"teacher\.context\.system is 'x', but teacher\.context\.function",
    ),
    "trust": ({"trust_context": "true"}, r"teacher\.context\.trust_context is True, but teacher\.context\.function"),
    "most": ({"max_tokens": 9}, r"teacher\.context\.max_tokens is 9, but teacher\.context\.function is null"),
    "braces": ({"template": "{prompt"}, r"teacher\.context\.template cannot be read.* and \{\{ and \}\} for braces"),
    "attribute": ({"template": "{answer.real}"}, r"has \{answer\.real\}, which names no field"),
    "format": ({"template": "{answer:>9}"}, r"has \{answer:>9\}, which names no field"),
    "number": ({"template": "{0}"}, r"has \{0\}, which names no field"),
    "nameless": ({"template": "{}"}, r"has \{\}, which names no field"),
    "count": ({"examples.count": 2}, r"teacher\.context\.examples\.count is 2, but teacher\.context\.examples\.path"),
    "unknown": ({"sytem": "x"}, r"teacher\.context\.sytem is no setting; did you mean .*teacher\.context\.system"),
}


@pytest.mark.parametrize(("context", "message"), SETTINGS.values(), ids=SETTINGS)
def test_refused_settings(tmp_path: Path, context: dict[str, object], message: str) -> None:
    settings = distillation(tmp_path / "run", tmp_path) | {f"teacher.context.{name}": v for name, v in context.items()}
    with pytest.raises(ConfigError, match=message):
        config("distill", settings)


def test_a_template_that_yaml_takes_for_a_group(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: r\nteacher:\n  context:\n    template: {prompt}\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"run\.yaml:4: teacher\.context\.template .* begins with a brace into quotes"
    ):
        commands.parse(["distill", str(file)])


def test_the_function_in_the_documentation(tmp_path: Path) -> None:
    (code,) = [code for code in blocks(REPOSITORY / "docs/teachers/teachers.md") if "def hint" in code]
    names: dict[str, Any] = {}
    exec(compile(code, "teachers.md", "exec"), names)
    row = parse_row("d.jsonl:1", ROW)
    right, wrong = Attempt("it is 2", 1.0, False), Attempt("3", 0.0, False)
    assert names["hint"](row, [wrong, right]) == [asked("1+1=\n\nThe answer is 2."), None]
