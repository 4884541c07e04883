"""What stands between two turns of a chat, read off the tokenizer's template."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.errors import ConfigError

_TEXTS = ("first-text", "second-text", "third-text", "fourth-text", "fifth-text")  # nothing that a template would strip


class TurnMarkers(NamedTuple):
    """`before` ends the student's turn and opens another's, `after` ends that and opens the student's next one."""

    before: str
    after: str

    def ids(self, text: str, tokenizer: PreTrainedTokenizerBase, last: int, ends: set[int]) -> list[int]:
        """Token ids to append after a turn whose last sampled token is `last`: an end of turn is not written twice."""
        ids: list[int] = list(tokenizer(f"{self.before}{text}{self.after}", add_special_tokens=False)["input_ids"])
        return ids[1:] if last in ends and ids[0] == last else ids


def turn_markers(tokenizer: PreTrainedTokenizerBase, role: str) -> TurnMarkers:
    """Found by rendering a conversation; it is rendered once more, longer, to see that the beginning stays as it was.

    Raises:
        ConfigError: Where the template has no such role, changes texts, or rewrites earlier turns when later ones come: the
            student would not see the conversation as it was trained to.
    """
    first, answer, reply, again, last = _TEXTS
    chat = [_message("user", first), _message("assistant", answer), _message(role, reply)]
    start, whole = _render(tokenizer, chat[:1], role), _render(tokenizer, chat, role)
    longer = _render(tokenizer, [*chat, _message("assistant", again), _message(role, last)], role)
    if not whole.startswith(start + answer) or reply not in whole[len(start + answer) :]:
        raise _refusal(role, "it does not leave the student's turn where it was sampled")
    before, _, after = whole[len(start + answer) :].partition(reply)
    if longer != f"{whole}{again}{before}{last}{after}":
        raise _refusal(role, "it rewrites earlier turns, or the text between them, when later ones come")
    if not (before and after):
        raise _refusal(role, "it puts nothing between two turns")
    return TurnMarkers(before, after)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], role: str) -> str:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"environment.role is {role!r} but the tokenizer has no chat template; set environment.role to null"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise _refusal(role, f"it refuses the conversation ({error})") from error
    return text


def _refusal(role: str, reason: str) -> ConfigError:
    return ConfigError(
        f"environment.role is {role!r}, but the tokenizer's chat template cannot carry a conversation on: {reason}. Use "
        f"another role, a template that only appends, or environment.role null (inside the student's own message)"
    )
