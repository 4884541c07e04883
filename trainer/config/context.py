"""What a teacher reads in place of the student's prompt."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field

from fastkl.trainer.config.data import COLUMNS
from fastkl.trainer.config.rules import at_least, unchanged
from fastkl.trainer.errors import ConfigError, require


@dataclass(frozen=True)
class ExamplesConfig:
    """Solved examples that stand before the teacher's chat.

    Args:
        path: Read them from this file or folder: rows with a `completion` each (docs/data.md).
        count: Take the first rows, this many. null: all.
    """

    path: str | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "examples.", "count")
        if self.path is None:
            unchanged(self, "examples.", "examples.path is null; name a file", ["count"])


@dataclass(frozen=True)
class ContextConfig:
    """The teacher's own prompt, before the same completion. Without any of these it reads the student's.

    Args:
        system: Put this text into the system turn, before what it says already.
        template: Write this text in place of the last user turn. {prompt} is that turn; {answer}, {completion}, the keys of
            `metadata` and other columns are the row's. {{ and }} are braces.
        messages: Take the whole chat from this column of the row, or from this key of its `metadata`.
        examples: Put solved examples before the chat, after its system turn.
        function: Let this Python function write the prompt: MODULE.NAME(row), or MODULE.NAME(row, samples) with all samples
            of the row, once they are graded.
        max_tokens: Let a function of samples write no prompt longer than this: the teacher reads the student's instead.
            A server needs it. null: as long as the teacher can read.
        trust_context: Allow the Python function that `function` names to be imported and run.
    """

    system: str | None = None
    template: str | None = None
    messages: str | None = None
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    function: str | None = None
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
        at_least(1, self, "context.", "max_tokens")
        self.columns  # noqa: B018 - refuses a template that cannot be read

    @property
    def template_fields(self) -> tuple[str, ...]:
        """The names in braces, each once.

        Raises:
            ConfigError: For a template that is no text with names in braces.
        """
        try:
            parts = list(string.Formatter().parse(self.template or ""))
        except ValueError as error:
            raise ConfigError(f"context.template cannot be read: {error}. {_BRACES}") from error
        for _, name, form, conversion in parts:
            require(
                name is None or (_NAME.fullmatch(name) is not None and not form and conversion is None),
                f"context.template has {{{name}{f'!{conversion}' * bool(conversion)}{f':{form}' * bool(form)}}}, which "
                f"names no field of a row. {_BRACES}",
            )
        return tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a row that it reads."""
        return self.template_fields + (() if self.messages is None else (self.messages,))


_NAME = re.compile(r"(?!\d+$)[\w-]+")
_BRACES = "Write {name} for a field, and {{ and }} for braces"
