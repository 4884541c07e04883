"""What chat templates write for rows: whole prompts, completions that end as the template ends a turn, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import FAMILIES, family_tokenizer

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.chat import end_of_turn
from fastkl.trainer.data.prompts import encode_completions, encode_prompts
from fastkl.trainer.data.rows import parse_row
from fastkl.trainer.data.template_variables import template_variables
from fastkl.trainer.errors import ConfigError

Row = dict[str, Any]

THOUGHT = "<think>\nhmm\n</think>\n\n4"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def system(text: Any) -> Row:
    return {"role": "system", "content": text}


def written(name: str, row: Row, **settings: Any) -> tuple[str, str]:
    """The prompt and the completion as text; a chat's ids are those of the template's own text."""
    words = family_tokenizer(name)
    prompts = encode_prompts([parse_row("d.jsonl:1", row)], words, DataConfig(path="p", **settings))
    (completion,) = encode_completions(prompts, words)
    return words.decode(prompts[0].ids), words.decode(completion)


ENDS = {
    "gemma": "<end_of_turn>",
    "qwen": "<|im_end|>",
    "qwen-base": "<|im_end|>",
    "llama": "<|eot_id|>",
    "smollm": "<|im_end|>",
    "r1": "<|end|>",
    "mistral": "</s>",
    "phi": "<|end|>",
    "ernie": "<|im_end|>",
    "alpaca": "",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_ends_a_turn_is_read_off_the_template(name: str) -> None:
    words = family_tokenizer(name)
    assert (None if not ENDS[name] else words.convert_tokens_to_ids(ENDS[name])) == end_of_turn(words)
    words.chat_template = None
    assert end_of_turn(words) is None


COMPLETIONS: dict[str, tuple[str, Row, str, str]] = {
    "gemma": ("gemma", {"prompt": "q", "completion": "4"}, "<start_of_turn>model\n", "4<end_of_turn>"),
    "gemma-trims": ("gemma", {"prompt": "q", "completion": " 4\n"}, "<start_of_turn>model\n", "4<end_of_turn>"),
    "gemma-ended": ("gemma", {"prompt": "q", "completion": "4<end_of_turn>\n"}, "model\n", "4<end_of_turn>"),
    "gemma-eos": ("gemma", {"prompt": "q", "completion": "4<eos>"}, "model\n", "4<end_of_turn>"),
    "gemma-both": ("gemma", {"prompt": "q", "completion": "4<end_of_turn>\n<eos>"}, "model\n", "4<end_of_turn>"),
    "qwen": ("qwen", {"prompt": "q", "completion": "4"}, "assistant\n", "<think>\n\n</think>\n\n4<|im_end|>"),
    "qwen-thought": ("qwen", {"prompt": "q", "completion": THOUGHT}, "assistant\n", f"{THOUGHT}<|im_end|>"),
    "qwen-half-thought": ("qwen", {"prompt": "q", "completion": THOUGHT[8:]}, "assistant\n", f"{THOUGHT}<|im_end|>"),
    "qwen-reasoning": (
        "qwen",
        {"messages": [user("q"), assistant("4", reasoning_content="hmm")]},
        "assistant\n",
        f"{THOUGHT}<|im_end|>",
    ),
    "qwen-call": (
        "qwen",
        {"messages": [user("q"), assistant(None, tool_calls=[CALL])], "tools": TOOLS},
        "assistant\n",
        '<think>\n\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
    ),
    "qwen-base": ("qwen-base", {"prompt": "q", "completion": "4"}, "assistant\n", "<think>\n\n</think>\n\n4<|im_end|>"),
    "llama": ("llama", {"messages": [user("q"), assistant("4")]}, "assistant<|end_header_id|>\n\n", "4<|eot_id|>"),
    "llama-ended": ("llama", {"prompt": "q", "completion": "4<|eot_id|>"}, "\n\n", "4<|eot_id|>"),
    "smollm": ("smollm", {"prompt": "q", "completion": "4 "}, "<|im_start|>assistant\n", "4 <|im_end|>"),
    "r1": ("r1", {"prompt": "q", "completion": "hmm\n</think>\n\n4"}, "<think>\n", "hmm\n</think>\n\n4<|end|>"),
    "r1-opened": ("r1", {"prompt": "q", "completion": THOUGHT}, "<think>\n", "hmm\n</think>\n\n4<|end|>"),
    "mistral": ("mistral", {"prompt": "q", "completion": "4"}, "q[/INST]", " 4</s>"),
    "mistral-system": ("mistral", {"messages": [system("s"), user("q"), assistant("4")]}, "s\n\nq[/INST]", " 4</s>"),
    "phi": ("phi", {"prompt": "q", "completion": "4"}, "<|assistant|>\n", "4<|end|>"),
    "alpaca": ("alpaca", {"prompt": "q", "completion": "4"}, "### assistant:\n", "4<eos>"),
    "alpaca-ended": ("alpaca", {"prompt": "q", "completion": "4<eos>"}, "### assistant:\n", "4<eos>"),
    "ernie": ("ernie", {"prompt": "q", "completion": "4"}, "assistant\n", "<response>\n4\n</response>\n<|im_end|>"),
    "ernie-ended": (
        "ernie",
        {"prompt": "q", "completion": "4<|im_end|>"},
        "\n",
        "<response>\n4\n</response>\n<|im_end|>",
    ),
    "qwen-other-end": ("qwen", {"prompt": "q", "completion": f"{THOUGHT}<|endoftext|>\n"}, "", f"{THOUGHT}<|im_end|>"),
    "later-turns": (
        "qwen",
        {"messages": [user("p"), assistant(THOUGHT), user("q"), assistant("5")]},
        "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n5<|im_end|>",
    ),
    "empty": ("smollm", {"prompt": "q", "completion": ""}, "assistant\n", "<|im_end|>"),
}


@pytest.mark.parametrize(("name", "row", "prompt", "completion"), COMPLETIONS.values(), ids=COMPLETIONS)
def test_a_completion_is_what_the_template_writes(name: str, row: Row, prompt: str, completion: str) -> None:
    before, after = written(name, row)
    assert before.endswith(prompt)
    assert after == completion


def test_a_text_without_a_chat_ends_with_the_tokenizers_end() -> None:
    for completion in ("4", "4<eos>", "4<end_of_turn>", "4<end_of_turn>\n", "4 <end_of_turn>\n<eos> "):
        _, after = written("gemma", {"prompt": "q", "completion": completion}, chat_template=False)
        assert after == (f"{completion.partition('>')[0]}>" if ">" in completion else "4<eos>")
    _, after = written("qwen", {"prompt": "q", "completion": "4<|endoftext|>\n"}, chat_template=False)
    assert after == "4<|endoftext|>"
    with pytest.raises(ConfigError, match=r"d\.jsonl:1: `completion` goes on after '<eos>'"):
        written("gemma", {"prompt": "q", "completion": "4<eos>5"}, chat_template=False)


CALLS = {
    "all": ("{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}", None),
    "first": ("{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}", "`tool_calls` (call 2)"),
    "names": (
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
        "`arguments` of `tool_calls` (call 1)",
    ),
}


@pytest.mark.parametrize(("shown", "message"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("reply", [True, False], ids=["reply", "earlier"])
def test_each_call_is_written_whatever_rows_came_before(shown: str, message: str | None, reply: bool) -> None:
    words = family_tokenizer(
        "smollm", template=FAMILIES["smollm"].template.replace("{{ m.content }}", "{{ m.content }}" + shown)
    )
    more = [] if reply else [user("r"), assistant("4")]
    bare = {"type": "function", "function": {"name": "add", "arguments": {}}}
    good = {"messages": [user("q"), assistant("", tool_calls=[bare]), *more]}
    bad = {"messages": [user("q"), assistant("", tool_calls=[CALL, CALL]), *more]}
    rows = [parse_row(f"d.jsonl:{number}", row) for number, row in enumerate((good, bad), start=1)]
    if message is None:
        assert len(encode_completions(encode_prompts(rows, words, DataConfig(path="p")), words)) == 2
        return
    with pytest.raises(ConfigError) as error:
        encode_completions(encode_prompts(rows, words, DataConfig(path="p")), words)
    assert str(error.value).startswith("d.jsonl:2: ")
    assert message in str(error.value)


def test_a_prompt_that_the_template_ends_is_refused() -> None:
    """A template that begins an answer after a user's turn alone."""
    template = FAMILIES["smollm"].template.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role == 'user' %}"
    )
    words = family_tokenizer("smollm", template=template)
    good, bad = [user("p"), assistant("4"), user("q")], [user("p"), assistant("4"), system("s")]
    rows = [parse_row("d.jsonl:1", {"messages": good}), parse_row("d.jsonl:2", {"messages": bad})]
    assert len(encode_prompts(rows[:1], words, DataConfig(path="p"))) == 1
    with pytest.raises(ConfigError, match=r"d\.jsonl:2: .*begins no answer after a turn of the role 'system'"):
        encode_prompts(rows, words, DataConfig(path="p"))


def test_only_variables_are_called_variables() -> None:
    template = (
        "{% if x %}{% set content = 1 %}{% endif %}{{ content }}{{ raise_exception('') if y is defined }}"
        "{% if not z is defined %}{% set z = 1 %}{% endif %}{{ z }}{% set n = namespace(a=1) %}{{ w | default(1) }}"
    )
    assert template_variables(template) == {"x", "y", "z", "w"}


REFUSED: dict[str, tuple[str, Row, str]] = {
    "system": ("gemma", {"messages": [system("s"), user("q")]}, "'System role not supported'"),
    "alternation": ("gemma", {"messages": [user("p"), user("q")]}, "'Conversation roles must alternate'"),
    "role-left-out": ("r1", {"messages": [system("s"), user("q")]}, "leaves out the `content` of turn 1 (system)"),
    "tools-left-out": ("llama", {"prompt": "q", "tools": TOOLS}, "has `tools`, which the chat template does not read"),
    "calls-left-out": (
        "llama",
        {"messages": [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "2"}]},
        "leaves out the `tool_calls` (call 1) of turn 2 (assistant)",
    ),
    "old-calls-left-out": (
        "qwen",
        {"messages": [user("q"), assistant(None, function_call=CALL["function"]), user("r")]},
        "leaves out the `function_call` (call 1) of turn 2 (assistant)",
    ),
    "an-end-in-it": ("smollm", {"prompt": "q", "completion": "4<|im_end|>5"}, "goes on after '<|im_end|>'"),
    "another-end-in-it": ("qwen", {"prompt": "q", "completion": "4<|endoftext|>5"}, "goes on after '<|endoftext|>'"),
    "rendered-already": ("llama", {"prompt": "<|bos|><|start_header_id|>user"}, "set data.chat_template to false"),
    "rendered-by-qwen": ("qwen", {"prompt": "<|im_start|>user\nq<|im_end|>"}, "begins with '<|im_start|>'"),
    "reasoning-left-out": (
        "smollm",
        {"messages": [user("q"), assistant("4", reasoning_content="hmm")]},
        "does not write the completion's `reasoning_content`",
    ),
    "thought-not-closed": ("r1", {"prompt": "q"}, "does not write the completion's `content`"),
}


@pytest.mark.parametrize(("name", "row", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_template_does_not_write_is_refused_with_the_row(name: str, row: Row, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        written(name, {"completion": "4"} | row if "messages" not in row else row)
    assert str(error.value).startswith("d.jsonl:1: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content.x.y }}", "has no attribute"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('\x1b]0;title\x07') }}", "'\\x1b]0;title\\x07'"),
    ],
    ids=["undefined", "type", "sandbox", "syntax", "escape"],
)
def test_whatever_a_template_raises_is_one_sentence(template: str, message: str) -> None:
    words = family_tokenizer("smollm", template=template)
    with pytest.raises(ConfigError) as error:
        encode_prompts([parse_row("d.jsonl:1", {"prompt": "q"})], words, DataConfig(path="p"))
    assert message in str(error.value)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_that_wants_parts_gets_them() -> None:
    """As templates of models that see: a text would be left out."""
    parts = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    words = family_tokenizer("smollm", template=FAMILIES["smollm"].template.replace("{{ m.content }}", parts))
    row = parse_row("d.jsonl:1", {"messages": [user("q"), assistant("4")]})
    prompts = encode_prompts([row], words, DataConfig(path="p"))
    assert words.decode(prompts[0].ids).endswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    assert words.decode(encode_completions(prompts, words)[0]) == "4<|im_end|>"


@pytest.mark.parametrize("shown", ["call.function.arguments | tojson", "'' + call.function.arguments"])
@pytest.mark.parametrize("given", [{"a": 1}, '{"a": 1}'], ids=["object", "text"])
def test_arguments_reach_templates_that_want_objects_or_text(shown: str, given: Any) -> None:
    calls = (
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ "
        + shown
        + " }}{% endfor %}<|im_end|>\n{% endfor"
    )
    words = family_tokenizer("smollm", template=FAMILIES["smollm"].template.replace("<|im_end|>\n{% endfor", calls))
    call = {"function": {"name": "add", "arguments": given}}
    row = parse_row("d.jsonl:1", {"messages": [user("q"), assistant(None, tool_calls=[call])]})
    prompts = encode_prompts([row], words, DataConfig(path="p"))
    assert words.decode(encode_completions(prompts, words)[0]) == 'add{"a": 1}<|im_end|>'


def test_a_tokenizer_with_several_templates() -> None:
    words = family_tokenizer("qwen")
    words.chat_template = {"default": FAMILIES["smollm"].template, "tool_use": FAMILIES["qwen"].template}
    rows = [parse_row("d.jsonl:1", {"prompt": "q"}), parse_row("d.jsonl:2", {"prompt": "q", "tools": TOOLS})]
    plain, with_tools = encode_prompts(rows, words, DataConfig(path="p"))
    assert words.decode(plain.ids).startswith("<|im_start|>system\nBe helpful")
    assert '"add"' in words.decode(with_tools.ids)
    words.chat_template = {"tool_use": FAMILIES["qwen"].template}
    with pytest.raises(ConfigError, match=r"d\.jsonl:1: the chat template refuses"):
        encode_prompts(rows, words, DataConfig(path="p"))
    with pytest.raises(ConfigError, match="the tokenizer's chat template"):
        encode_prompts(rows, words, DataConfig(path="p", template_kwargs={"enable_thinking": True}))


def test_variables_and_tools_reach_the_template() -> None:
    row = {"prompt": "q", "completion": "4", "tools": TOOLS}
    before, after = written("qwen", row, template_kwargs={"enable_thinking": False})
    assert '"name": "add"' in before
    assert before.endswith("assistant\n<think>\n\n</think>\n\n")
    assert after == "4<|im_end|>"  # the empty thought stands in the prompt
    before, _ = written("llama", {"prompt": "q", "completion": "4"}, template_kwargs={"date_string": "1 May"})
    assert "Today: 1 May" in before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"template_kwargs": {"enable_thinkin": False}},
            "'enable_thinkin', which the chat template does not read; it reads",
        ),
        ({"template_kwargs": {"tools": []}}, "'tools', which the trainer sets itself"),
        ({"template_kwargs": {"messages": []}}, "'messages', which the trainer sets itself"),
        ({"template_kwargs": {"tokenize": True}}, "'tokenize', which the trainer sets itself"),
        ({"template_kwargs": {"enable_thinking": False}, "chat_template": False}, "holds no chats"),
    ],
)
def test_variables_that_nothing_would_read_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.template_kwargs") as error:
        written("qwen", {"prompt": "q", "completion": "4"}, **settings)
    assert message in str(error.value)
