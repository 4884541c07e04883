"""What a chat template writes for a given completion."""

from __future__ import annotations

import dataclasses
import re

from fastkl.trainer.data.chat import ANSWER, ASKED, ChatTemplate, Refusal
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.turns import Turn, left_out, left_out_call, with_marked_calls
from fastkl.trainer.errors import ConfigError

_OPENED = re.compile(r"<(\w+)>\s*\Z")  # a tag that a prompt leaves open, as <think>
_THOUGHTS = ("think", "thinking", "thought", "thoughts", "reasoning", "scratchpad")  # others may begin any answer


def reply_text(chat: ChatTemplate, row: Prompt, prompt: str) -> str:
    """What the template writes after the `prompt` for the row's completion, up to and with the end of the turn.

    Without a token that ends turns, up to the end of the text. An end that the completion itself has is not written twice.

    Raises:
        ConfigError: Naming the row, where the template would write something else than the completion.
    """
    turn = row.reply_turn
    opened = opened_tag(prompt)
    content = without_end(chat, row.source, turn["content"])[0]
    if opened is not None:
        content = re.sub(rf"^\s*<{opened}>\s*", "", content)  # it stands in the prompt
    turn = turn | {"content": content}
    try:
        written = _written(chat, row, prompt, turn)
    except Refusal as error:
        raise ConfigError(f"{row.source}: {error}") from error
    if (part := left_out(turn, written) or _left_out_call(chat, row, prompt, turn)) is None:
        return _up_to_end(chat, written)
    if opened is not None and f"</{opened}>" in content:  # the completion goes on from the open tag
        return content + chat.after_answer[0]
    raise ConfigError(
        f"{row.source}: after the prompt, which ends in {prompt[-20:]!r}, the chat template does not write the "
        f"completion's {part} as it stands; give it another form, set data.template_kwargs, or render the chat into a text "
        f"`prompt` and set data.chat_template to false"
    )


def opened_tag(prompt: str) -> str | None:
    """The name of a tag that the end of a prompt leaves open; None where it leaves none."""
    opened = _OPENED.search(prompt)
    return None if opened is None else opened[1]


def opened_thought(prompt: str) -> str | None:
    """The name of a tag of thoughts that the end of a prompt leaves open; None where it leaves none."""
    opened = opened_tag(prompt)
    return opened if opened in _THOUGHTS else None


def content_of(chat: ChatTemplate, row: Prompt, prompt: str, written: str) -> str:
    """The completion for which the template writes this text after the `prompt`, ends aside; the text if there is none.

    A template may write more around a completion, such as tags, and a model has learned to write that too.
    """
    around = _reply(chat, row, prompt, ANSWER) or ANSWER
    before, _, after = around.partition(ANSWER)
    after = next((after.removesuffix(end) for end in chat.ends if after.endswith(end)), after)
    inner = written.removeprefix(before).removesuffix(after)
    for content in (written, inner):
        reply = _reply(chat, row, prompt, content)
        if reply is not None and reply.startswith(written) and reply[len(written) :].strip() in ("", *chat.ends):
            return content
    return written


def _reply(chat: ChatTemplate, row: Prompt, prompt: str, content: str) -> str | None:
    """`reply_text` of another completion; None where the template would not write it."""
    try:
        return reply_text(chat, dataclasses.replace(row, completion=content, reply=None, truncated=False), prompt)
    except ConfigError:
        return None


def text_reply(chat: ChatTemplate, row: Prompt) -> str:
    """The row's completion of a text that is no chat, up to and with its first end, if it has one."""
    text = str(row.completion)
    bare, first = without_end(chat, row.source, text)
    return text[: text.index(first, len(bare)) + len(first)] if first else text


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


def _left_out_call(chat: ChatTemplate, row: Prompt, prompt: str, turn: Turn) -> str | None:
    marked = with_marked_calls(len(row.turns) + 1, turn)
    return None if marked == turn else left_out_call(marked, _written(chat, row, prompt, marked))


def without_end(chat: ChatTemplate, source: str, text: str) -> tuple[str, str]:
    """A completion up to its own end, and the token that ends it first; without any, the text as it is and "".

    Raises:
        ConfigError: Naming the row, where text follows an end: no model that stops there writes it.
    """
    bare, first = text.rstrip(), ""
    whole = chat.after_answer[0].strip()  # it may close a tag before the token
    while end := next((end for end in (whole, *chat.ends) if end and bare.endswith(end)), ""):
        bare = bare[: -len(end)].rstrip()
        first = end
    if inner := next((end for end in chat.ends if end in bare), None):
        raise ConfigError(
            f"{source}: `completion` goes on after {inner!r}, which ends it; cut it there, or make it turns of `messages`"
        )
    return (bare, first) if first else (text, "")
