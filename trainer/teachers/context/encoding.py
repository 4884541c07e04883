"""What the teacher reads as token ids. The completion begins after it as it begins after the student's prompt."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.rows import check_encodable
from fastkl.trainer.data.text import encode
from fastkl.trainer.data.turns import Turn, left_out
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.teachers.context.turns import Content

SHOWN = 60  # characters of a prompt's end


def encode_contents(
    prompts: Sequence[EncodedPrompt], contents: Sequence[Content], tokenizer: PreTrainedTokenizerBase, setting: str
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
    texts = [
        str(row.prompt) if prompt.chat is None else prompt.chat.prompt(row)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    ids = encode(tokenizer, texts, [prompt.chat is None for prompt in prompts])
    found = []
    for prompt, row, text, tokens in zip(prompts, rows, texts, ids, strict=True):
        _check_end(prompt, text, tokens, tokenizer, setting)
        found.append(dataclasses.replace(prompt, row=row, tokens=array("i", tokens)))
    return found


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


def _check_end(
    prompt: EncodedPrompt, text: str, tokens: list[int], tokenizer: PreTrainedTokenizerBase, setting: str
) -> None:
    """Of a chat, what begins the answer; of a text, the last token."""
    if prompt.chat is None:
        ours, theirs = str(prompt.row.prompt), text
        same = prompt.ids[-1:] == tokens[-1:]
        remedy = f"Let {setting} end as the prompts do, for example with {{prompt}}"
    else:
        ours, theirs = prompt.chat.prompt(prompt.row), text
        opening = len(prompt.chat.opening) or 1
        same = ours[-opening:] == theirs[-opening:]
        remedy = (
            f"Take out of {setting} what makes the chat template begin the answer otherwise, or write it into the "
            f"student's prompts too"
        )
    if not same:
        raise ConfigError(
            f"{prompt.row.source}: the student's prompt ends in {ours[-SHOWN:]!r} and the teacher's, by {setting}, in "
            f"{theirs[-SHOWN:]!r}: the teacher would expect another beginning of the answer. {remedy}"
        )
