"""A tokenizer's chat template with its variables, and what it writes for a prompt."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.template_variables import template_variables
from fastkl.trainer.data.turns import Turn, calls_as_text, left_out, left_out_call, make_turn, marked
from fastkl.trainer.errors import ConfigError

ASKED, ANSWER = make_turn("user", "first-text"), "second-text"  # nothing that a template would change

# Tokens that end a completion in some family of models, whatever else its tokenizer declares.
USUAL_ENDS = frozenset(
    {
        "</s>",
        "<eos>",
        "<|eos|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<|im_end|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|return|>",
        "<｜end▁of▁sentence｜>",
        "[|endofturn|]",
    }
)


class Refusal(ValueError):
    """What a template says against a conversation."""


class ChatTemplate:
    """The template with what it may read beside messages and tools: `variables` (`data.template_kwargs`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.variables = tokenizer, dict(variables or {})
        self._whole: set[bytes] = set()  # marked conversations that it writes without leaving anything out
        added = tokenizer.added_tokens_decoder.values()
        self._special = _any_of({str(token) for token in added if token.special} | {tokenizer.eos_token or ""})
        self._added = _any_of({str(token) for token in added})

    def render(self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None = None, *, to_answer: bool) -> str:
        """The conversation as text; `to_answer`: up to where the assistant's next turn begins.

        Raises:
            Refusal: What the template says against it.
        """
        turns = [_in_parts(turn) if self._wants_parts else turn for turn in turns]
        try:
            return self._render(turns, tools, to_answer)
        except Refusal:
            as_text = [calls_as_text(turn) for turn in turns]
            if as_text == turns:
                raise
            return self._render(as_text, tools, to_answer)

    def _render(self, turns: Iterable[Turn], tools: list[dict[str, Any]] | None, to_answer: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(turns), tools=tools, add_generation_prompt=to_answer, tokenize=False, **self.variables
            )
        except Exception as error:  # a template raises what it likes
            raise Refusal(f"the chat template refuses the conversation: {str(error)[:300]!r}") from error
        return text

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether it reads contents as lists of parts alone, as templates of models that see may do."""
        found = []
        for turn in (ASKED, _in_parts(ASKED)):
            try:
                found.append(ASKED["content"] in self._render([turn], None, True))
            except Refusal:
                found.append(False)
        return found == [False, True]

    def prompt(self, row: Prompt) -> str:
        """A row up to where the answer begins.

        Raises:
            ConfigError: Naming the row, where the template refuses it or leaves a part of it out.
        """
        try:
            self._check(row)
            text = self.render(row.turns, row.tools, to_answer=True)
            if end := next((end for end in self.ends if text.rstrip().endswith(end)), None):
                raise Refusal(
                    f"the chat template begins no answer after a turn of the role {row.turns[-1]['role']!r}: the prompt "
                    f"would end in {end!r}; let the chat end with another turn"
                )
        except Refusal as error:
            raise ConfigError(f"{row.source}: {error}") from error
        return text

    @cached_property
    def opening(self) -> str:
        """What begins the assistant's turn; of a template that writes nothing for it, what follows the user's text."""
        try:
            asked, whole = (self.render([ASKED], to_answer=to_answer) for to_answer in (False, True))
        except Refusal:
            return ""
        added = whole.removeprefix(asked)
        return added if added and added != whole else whole.rpartition(ASKED["content"])[2]

    @cached_property
    def before_answer(self) -> str:
        """What the template writes between a prompt and the assistant's text in the last turn; "" where it writes the two
        apart from each other."""
        try:
            start = self.render([ASKED], to_answer=True)
            whole = self.render([ASKED, make_turn("assistant", ANSWER)], to_answer=False)
        except Refusal:
            return ""
        before, found, _ = whole.removeprefix(start).partition(ANSWER)
        return before if found and whole.startswith(start) else ""

    @cached_property
    def after_answer(self) -> tuple[str, str]:
        """What follows the assistant's text in its last turn: up to and with the token that ends the turn, and the rest.

        The token is the first special one; without any, the first added token that ends the user's turns too. Where a
        template ends turns without such a token, the first text is "".
        """
        try:
            whole = self.render([ASKED, make_turn("assistant", ANSWER)], to_answer=False)
        except Refusal:
            return "", ""
        before, _, after = whole.rpartition(ANSWER)
        ends = [found for found in self._added.finditer(after) if found[0] in before]
        end = self._special.search(after) or (ends[0] if ends else None)
        return ("", after) if not before or end is None else (after[: end.end()], after[end.end() :])

    @property
    def end_token(self) -> str:
        """The token that ends the assistant's turn; "" where none does."""
        tokens = self._added.findall(self.after_answer[0]) or self._special.findall(self.after_answer[0])
        return str(tokens[-1]) if tokens else ""

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens that end a completion: the template's, the tokenizer's, and the usual ones among its special ones."""
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        found = {self.end_token, self.tokenizer.eos_token or "", *(special & USUAL_ENDS)}
        return tuple(sorted((end for end in found if end), key=len, reverse=True))

    def ends_in_token(self, text: str) -> bool:
        """Whether a text ends with a token that no plain text has."""
        return any(found.end() == len(text) for found in self._added.finditer(text))

    def _check(self, row: Prompt) -> None:
        if isinstance(row.prompt, str) and (found := self._special.match(row.prompt.lstrip())):
            raise Refusal(
                f"the text begins with {found[0]!r}, as a chat does that is rendered already; set data.chat_template to "
                f"false"
            )
        turns = [marked(number, turn) for number, turn in enumerate(row.turns, start=1)]
        kind = hashlib.sha256(repr((turns, row.tools)).encode()).digest()  # all that the check depends on
        if kind in self._whole:
            return
        if row.tools and "tools" not in self._reads(row.tools):
            raise Refusal("the row has `tools`, which the chat template does not read")
        self._check_whole(turns, row.tools)
        self._whole.add(kind)

    def _check_whole(self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> None:
        """Every text of a marked conversation is in what the template writes, and every call of a tool."""
        try:
            text = self.render(turns, tools, to_answer=True)
        except Refusal:  # it wants other texts; what it makes of the row's own is seen there
            return
        for number, turn in enumerate(turns, start=1):
            if part := left_out(turn, text) or left_out_call(turn, text):
                raise Refusal(f"the chat template leaves out the {part} of turn {number} ({turn['role']})")

    def check_variables(self, setting: str = "data.template_kwargs") -> None:
        """All that the setting gives is read by the template, and not set by the trainer."""
        own = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) | {"messages"}
        read = self._reads(None) | self._reads([{}])
        for name in self.variables:
            if name in own - {"documents"}:
                raise ConfigError(f"{setting} has {name!r}, which the trainer sets itself; leave it out")
            if name not in read:
                known = ", ".join(sorted(read - own)) or "none"
                raise ConfigError(f"{setting} has {name!r}, which the chat template does not read; it reads {known}")

    def _reads(self, tools: list[dict[str, Any]] | None) -> set[str]:
        try:
            return template_variables(self.tokenizer.get_chat_template(None, tools))
        except ValueError as error:  # several templates, and none is the default
            raise ConfigError(f"the tokenizer's chat template: {str(error)[:300]!r}") from error


def chat_template(source: str, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> ChatTemplate:
    """The tokenizer's template for the row called `source`; a ConfigError where it has none."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{source}: the tokenizer has no chat template; set data.chat_template to false and give text prompts"
        )
    template = ChatTemplate(tokenizer, variables)
    if variables:
        template.check_variables()
    return template


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that ends an assistant's turn in the tokenizer's chats; None without one."""
    token = "" if tokenizer.chat_template is None else ChatTemplate(tokenizer).end_token
    found: int | None = tokenizer.convert_tokens_to_ids(token) if token else None
    return found


def _in_parts(turn: Turn) -> Turn:
    return turn | {"content": [{"type": "text", "text": turn["content"]}]}


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
