"""What the teacher reads as token ids. The completion begins after it as it begins after the student's prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.replies import opened_thought
from fastkl.trainer.data.rows import Prompt, check_encodable
from fastkl.trainer.data.text import encode
from fastkl.trainer.data.turns import Turn, left_out
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.teachers.alignment.beginnings import Beginnings
from fastkl.trainer.teachers.alignment.reader import Reader
from fastkl.trainer.teachers.context.turns import Content

SHOWN = 60  # characters of a prompt's end


def encode_contents(
    prompts: Sequence[EncodedPrompt], contents: Sequence[Content], reader: Reader, setting: str
) -> list[EncodedPrompt]:
    """The teacher's prompts, each with the index of the student's. `setting` is the one that they come from.

    Raises:
        ConfigError: Naming the row, where the template refuses a chat, or begins the answer otherwise than after the
            student's prompt, and where a content is no text.
    """
    rows = [
        dataclasses.replace(prompt.row, prompt=content, source=f"{prompt.row.source} with {setting}")
        for prompt, content in zip(prompts, contents, strict=True)
    ]
    for row in rows:
        check_encodable(row.source, {"prompt": row.prompt}, ["prompt"])
    chats = [reader.chat(prompt) for prompt in prompts]
    texts = [_text(row, chat, reader) for row, chat in zip(rows, chats, strict=True)]
    ids = encode(reader.tokenizer, texts, [chat is None for chat in chats])
    found = []
    for prompt, row, chat, text, tokens in zip(prompts, rows, chats, texts, ids, strict=True):
        if reader.own:
            _check_end_of_text(prompt, text, chat, setting)
        else:
            _check_end(prompt, text, tokens, setting)
        found.append(dataclasses.replace(prompt, row=row, tokens=tokens, chat=chat))
    return found


def _text(row: Prompt, chat: ChatTemplate | None, reader: Reader) -> str:
    try:
        return str(row.prompt) if chat is None else chat.prompt(row)
    except ConfigError as error:
        if not reader.own:
            raise
        raise ConfigError(
            f"{error}. It is the teacher's template; give this teacher other turns by messages or function of its context"
        ) from error


def check_examples(examples: Sequence[Turn], prompt: EncodedPrompt, setting: str) -> None:
    """The answers of examples stand whole in a teacher's prompt; templates drop the thoughts of earlier turns.

    `setting` is the name of the examples.
    """
    text = "" if prompt.chat is None else prompt.chat.prompt(prompt.row)
    for turn in examples:
        if turn["role"] == "assistant" and (part := left_out(turn, text)):
            raise ConfigError(
                f"{setting}: the chat template leaves a part out of the {part} of an example's answer, which begins with "
                f"{turn['content'][:SHOWN]!r}, as templates do with the thoughts of earlier turns. Take it out of the "
                f"examples, or write them into a context's template"
            )


_AS_PROMPTS = "Let {0} end as the prompts do, for example with {{prompt}}"
_WITHOUT = (
    "Take out of {0} what makes the template begin the answer otherwise, or write it into the student's prompts too"
)
_ALIKE = (
    "Let both templates begin it alike: set data.template_kwargs, or template_kwargs of the teacher's context, for example "
    "to {{enable_thinking: false}}"
)


def _check_end(prompt: EncodedPrompt, text: str, tokens: list[int], setting: str) -> None:
    """Of a chat, what begins the answer; of a text, the last token."""
    if prompt.chat is None:
        _require(prompt.ids[-1:] == tokens[-1:], prompt, text, setting, _AS_PROMPTS)
    else:
        opening = len(prompt.chat.opening) or 1
        _require(_written(prompt)[-opening:] == text[-opening:], prompt, text, setting, _WITHOUT)


def _check_end_of_text(prompt: EncodedPrompt, text: str, chat: ChatTemplate | None, setting: str) -> None:
    """As `_check_end`, by another tokenizer: of a chat, the thought that is left open; of a text, the last character.

    `chat` is the teacher's. What it writes before an answer may close its thought.
    """
    ours = _written(prompt)
    if prompt.chat is None or chat is None:
        _require(ours[-1:] == text[-1:], prompt, text, setting, _AS_PROMPTS)
        return
    opened = opened_thought(ours)
    if opened is None:
        text_of_answer = text + Beginnings.of(prompt.chat, chat).theirs
        _require(opened_thought(text_of_answer) is None, prompt, text, setting, _ALIKE)
    else:
        _require(opened == opened_thought(text), prompt, text, setting, _ALIKE)


def _written(prompt: EncodedPrompt) -> str:
    return str(prompt.row.prompt) if prompt.chat is None else prompt.chat.prompt(prompt.row)


def _require(same: bool, prompt: EncodedPrompt, text: str, setting: str, remedy: str) -> None:
    if not same:
        raise ConfigError(
            f"{prompt.row.source}: the student's prompt ends in {_written(prompt)[-SHOWN:]!r} and the teacher's, by "
            f"{setting}, in {text[-SHOWN:]!r}: the teacher would expect another beginning of the answer. "
            f"{remedy.format(setting)}"
        )
