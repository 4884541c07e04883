"""What a chat template writes for a given completion."""

from __future__ import annotations

import re

from fastkl.trainer.data.chat import ASKED, ChatTemplate, Refusal
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.turns import Turn, left_out
from fastkl.trainer.errors import ConfigError

_OPENED = re.compile(r"<(\w+)>\s*\Z")  # a tag that a prompt leaves open, as <think>


def reply_text(chat: ChatTemplate, row: Prompt, prompt: str) -> str:
    """What the template writes after the `prompt` for the row's completion, up to and with the end of the turn.

    Without a token that ends turns, up to the end of the text. An end that the completion itself has is not written twice.

    Raises:
        ConfigError: Naming the row, where the template would write something else than the completion.
    """
    turn = row.reply_turn
    opened = _OPENED.search(prompt)
    content = _without_end(chat, turn["content"])
    if opened is not None:
        content = re.sub(rf"^\s*<{opened[1]}>\s*", "", content)  # it stands in the prompt
    turn = turn | {"content": content}
    try:
        written = _written(chat, row, prompt, turn)
    except Refusal as error:
        raise ConfigError(f"{row.source}: {error}") from error
    if (part := left_out(turn, written)) is None:
        return _up_to_end(chat, written)
    if opened is not None and f"</{opened[1]}>" in content:  # the completion goes on from the open tag
        return content + chat.after_answer[0]
    raise ConfigError(
        f"{row.source}: after the prompt, which ends in {prompt[-20:]!r}, the chat template does not write the "
        f"completion's {part} as it stands; give it another form, set data.template_kwargs, or render the chat into a text "
        f"`prompt` and set data.chat_template to false"
    )


def _written(chat: ChatTemplate, row: Prompt, prompt: str, turn: Turn) -> str:
    """What follows the prompt once there is an answer; "" where the prompt does not stay as it was."""
    whole = chat.render([*row.turns, turn], row.tools, to_answer=False)
    if not whole.startswith(prompt):  # it puts earlier turns otherwise then: the answer to a bare question counts
        prompt = chat.render([ASKED], row.tools, to_answer=True)
        whole = chat.render([ASKED, turn], row.tools, to_answer=False)
    return whole[len(prompt) :] if whole.startswith(prompt) else ""


def _up_to_end(chat: ChatTemplate, written: str) -> str:
    end, rest = chat.after_answer
    written = written.removesuffix(rest)
    # A call of a tool may end in another token, and with other white space.
    return written.rstrip() if end and chat.ends_in_token(written.rstrip()) else written


def _without_end(chat: ChatTemplate, text: str) -> str:
    bare = text.rstrip()
    ends = tuple(end for end in (chat.after_answer[0].strip(), chat.end_token, chat.tokenizer.eos_token) if end)
    if not bare.endswith(ends):
        return text
    while bare.endswith(ends):
        bare = bare[: -max(len(end) for end in ends if bare.endswith(end))].rstrip()
    return bare
