"""What a teacher reads in place of the student's prompt."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from fastkl.trainer.config.data import COLUMNS
from fastkl.trainer.config.rules import at_least, unchanged
from fastkl.trainer.errors import ConfigError, require


@dataclass(frozen=True)
class ExamplesConfig:
    """Solved examples that stand before the teacher's chat.

    Args:
        path: Read them from this file or folder: rows with a `completion` each (docs/data/data.md).
        count: Take the first rows, this many. null: all.
    """

    path: str | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "examples.", "count")
        if self.path is None:
            unchanged(self, "examples.", "examples.path is null; name a file", ["count"])


@dataclass(frozen=True)
class SiblingConfig:
    """What `context.function: sibling` writes: a success of the same prompt, and what the environment said (SDPO).

    Args:
        success: Call a sample with this reward or a higher one a success.
        template: Write this text in place of the last user turn. {prompt} is that turn. {solution} and {feedback} are the
            texts of the next two settings, or nothing.
        solution: Show another sample of the prompt that succeeded like this; {text} is what the student wrote.
        thoughts: Show what a success thought too: all before its last </think>.
        feedback: Show what the environment said of the sample like this; {text} is that. null: leave it out.
        succeeded: Leave samples that succeeded out of the loss (mask), let their teacher read the student's prompt (plain),
            or another success (sibling).
        alone: Where a sample has neither another success nor feedback, let its teacher read the student's prompt (plain),
            or leave it out of the loss (mask).
    """

    success: float = 1.0
    template: str = "{prompt}{solution}{feedback}\n\nNow answer the question."
    solution: str = "\n\nA right answer:\n{text}"
    thoughts: bool = True
    feedback: str | None = "\n\nWhat was said of a wrong answer:\n{text}"
    succeeded: Literal["mask", "plain", "sibling"] = "mask"
    alone: Literal["plain", "mask"] = "plain"

    def __post_init__(self) -> None:
        require(math.isfinite(self.success), f"sibling.success is {self.success}; it must be finite")
        _check_names("sibling.template", self.template, ("prompt", "solution", "feedback"), ("prompt", "solution"))
        _check_names("sibling.solution", self.solution, ("text",), ("text",))
        if self.feedback is not None:
            _check_names("sibling.feedback", self.feedback, ("text",), ("text",))


SIBLING = "sibling"  # the function that fastkl has


@dataclass(frozen=True)
class ContextConfig:
    """The teacher's own prompt, before the same completion. Without any of these it reads the student's.

    Args:
        system: Put this text into the system turn, before what it says already.
        template: Write this text in place of the last user turn. {prompt} is that turn; {answer}, {completion}, the keys of
            `metadata` and other columns are the row's. {{ and }} are braces.
        messages: Take the whole chat from this column of the row, or from this key of its `metadata`.
        examples: Put solved examples before the chat, after its system turn.
        function: Let this function write the prompt. sibling: of a failed sample, with one that succeeded. Or one of yours:
            MODULE.NAME(row), or MODULE.NAME(row, samples) with all samples of the row, once they are graded.
        sibling: Say what the function sibling does.
        template_kwargs: Pass these variables to the teacher's chat template, beside those of data.template_kwargs, for
            example {enable_thinking: false}. Only a teacher with its own tokenizer has a template of its own.
        max_tokens: Let a function of samples write no prompt longer than this: the teacher reads the student's instead.
            A server needs it. null: as long as the teacher can read.
        trust_context: Allow the Python function that `function` names to be imported and run.
    """

    system: str | None = None
    template: str | None = None
    messages: str | None = None
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    function: str | None = None
    sibling: SiblingConfig = field(default_factory=SiblingConfig)
    template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    max_tokens: int | None = None
    trust_context: bool = False

    def __post_init__(self) -> None:
        for name in ("system", "template", "messages", "function"):
            require(getattr(self, name) != "", f"context.{name} is empty; unset it, or give it a text")
        require(
            self.template is None or self.messages is None,
            f"context.template is {self.template!r:.40} and context.messages is {self.messages!r}: both say what is asked; "
            f"unset one of them",
        )
        require(
            self.messages not in COLUMNS,
            f"context.messages is {self.messages!r}, which is not a column of the teacher's own; name another one",
        )
        if self.function is not None:
            reason = f"context.function is {self.function!r}, which writes the whole prompt; unset one of them"
            unchanged(self, "context.", reason, ["system", "template", "messages", "examples"])
        else:
            unchanged(self, "context.", "context.function is null; unset it", ["max_tokens", "trust_context"])
        self._check_sibling()
        at_least(1, self, "context.", "max_tokens")
        self.columns  # noqa: B018 - refuses a template that cannot be read

    def _check_sibling(self) -> None:
        function = self.function
        require(
            function in (None, SIBLING) or "." in str(function),
            f"context.function is {function!r}; known are {SIBLING} and MODULE.NAME, a function of yours",
        )
        if function == SIBLING:
            unchanged(self, "context.", f"context.function is {SIBLING}, which is no code of yours", ["trust_context"])
        else:
            reason = f"context.function is {'null' if function is None else repr(function)}; set it to {SIBLING}"
            unchanged(self.sibling, "context.sibling.", reason)

    @property
    def template_fields(self) -> tuple[str, ...]:
        """The names in braces, each once.

        Raises:
            ConfigError: For a template that is no text with names in braces.
        """
        return _names("context.template", self.template or "", "names no field of a row")

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a row that it reads."""
        return self.template_fields + (() if self.messages is None else (self.messages,))


def _names(setting: str, text: str, wrong: str) -> tuple[str, ...]:
    """The names in braces of a setting, each once. `wrong` says what is wrong of another one."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{setting} cannot be read: {error}. {_BRACES}") from error
    for _, name, form, conversion in parts:
        require(
            name is None or (_NAME.fullmatch(name) is not None and not form and conversion is None),
            f"{setting} has {{{name}{f'!{conversion}' * bool(conversion)}{f':{form}' * bool(form)}}}, which "
            f"{wrong}. {_BRACES}",
        )
    return tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))


def _check_names(setting: str, text: str, known: Collection[str], needed: Collection[str]) -> None:
    wrong = f"is not known; known are {' and '.join(f'{{{name}}}' for name in known)}"
    found = _names(setting, text, wrong)
    for name in found:
        require(name in known, f"{setting} has {{{name}}}, which {wrong}. {_BRACES}")
    for name in needed:
        require(name in found, f"{setting} is {text!r}, without {{{name}}}; put it in")


_NAME = re.compile(r"(?!\d+$)[\w-]+( [\w-]+)*")  # columns may have names of several words
_BRACES = "Write {name} for a field, and {{ and }} for braces"
