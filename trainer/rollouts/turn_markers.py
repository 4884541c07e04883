"""What stands between two turns of a chat, read off the tokenizer's template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.chat import ChatTemplate, Refusal
from fastkl.trainer.data.turns import Turn, make_turn
from fastkl.trainer.errors import ConfigError

_TEXTS = ("first-text", "second-text", "third-text", "fourth-text", "fifth-text")  # nothing that a template would strip


class TurnMarkers(NamedTuple):
    """`before` ends the student's turn and opens another's, `after` ends that and opens the student's next one."""

    before: str
    after: str

    def ids(self, text: str, tokenizer: PreTrainedTokenizerBase, last: int, ends: set[int]) -> list[int]:
        """Token ids to append after a turn whose last sampled token is `last`: an end of turn is not written twice."""
        ids: list[int] = list(tokenizer(f"{self.before}{text}{self.after}", add_special_tokens=False)["input_ids"])
        own: list[int] = tokenizer(self.before, add_special_tokens=False)["input_ids"]
        return ids[ids.index(last) + 1 :] if last in ends and last in own else ids


def turn_markers(
    tokenizer: PreTrainedTokenizerBase, role: str, variables: Mapping[str, Any] | None = None
) -> TurnMarkers:
    """Found by rendering a conversation, with the template's `variables`; it is rendered once more, longer, to see that the
    beginning stays as it was.

    Raises:
        ConfigError: Where the template has no such role, changes texts, or rewrites earlier turns when later ones come: the
            student would not see the conversation as it was trained to.
    """
    first, answer, reply, again, last = _TEXTS
    chat = [make_turn("user", first), make_turn("assistant", answer), make_turn(role, reply)]
    template = _template(tokenizer, role, variables)
    start, whole = _render(template, chat[:1], role), _render(template, chat, role)
    longer = _render(template, [*chat, make_turn("assistant", again), make_turn(role, last)], role)
    space, found, rest = whole[len(start) :].partition(answer)  # white space before an answer is sampled with it
    if not whole.startswith(start) or not found or space.strip() or reply not in rest:
        raise _refusal(role, "it does not leave the student's turn where it was sampled")
    before, _, after = rest.partition(reply)
    if longer != f"{whole}{space}{again}{before}{last}{after}":
        raise _refusal(role, "it rewrites earlier turns, or the text between them, when later ones come")
    if not (before and after):
        raise _refusal(role, "it puts nothing between two turns")
    return TurnMarkers(before, after)


def _template(tokenizer: PreTrainedTokenizerBase, role: str, variables: Mapping[str, Any] | None) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"environment.role is {role!r} but the tokenizer has no chat template; set environment.role to null"
        )
    return ChatTemplate(tokenizer, variables)


def _render(template: ChatTemplate, turns: list[Turn], role: str) -> str:
    try:
        return template.render(turns, to_answer=True)
    except Refusal as error:
        raise _refusal(role, str(error)) from error


def _refusal(role: str, reason: str) -> ConfigError:
    return ConfigError(
        f"environment.role is {role!r}, but the tokenizer's chat template cannot carry a conversation on: {reason}. Use "
        f"another role, a template that only appends, or environment.role null (inside the student's own message)"
    )
