"""Functions that write the teacher's prompt: of the row alone, or of all that the student made of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastkl.trainer.config.context import SIBLING, ContextConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.errors import ConfigError, brief
from fastkl.trainer.rollouts.grading.trusted import imported
from fastkl.trainer.teachers.context.attempts import Attempt, Told
from fastkl.trainer.teachers.context.siblings import Siblings
from fastkl.trainer.teachers.context.turns import Content, read_chat


class Written(NamedTuple):
    """A function that writes prompts, under the setting that names it."""

    setting: str
    call: Callable[..., Any]
    of_samples: bool  # it is called with (row, samples), and writes a prompt for each; else with (row)

    def of_row(self, prompt: EncodedPrompt) -> Content:
        """What the teacher reads before every completion of the prompt."""
        return self._content(prompt, self._called(prompt.row))

    def of_attempts(self, prompt: EncodedPrompt, attempts: Sequence[Attempt]) -> list[Told]:
        """What the teacher reads before each of the completions."""
        found = self._called(prompt.row, list(attempts))
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != len(attempts):
            raise ConfigError(
                f"{prompt.row.source}: {self.setting} gave {str(found)[:80]!r}; it must give a list with one entry for "
                f"each of the {len(attempts)} samples: messages, or None for the student's prompt"
            )
        return [Told(None if each is None else self._content(prompt, each)) for each in found]

    def _called(self, row: Prompt, *more: Any) -> Any:
        try:
            return self.call(copy.deepcopy(row), *more)  # its own: what it changes there, nobody else reads
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(f"{row.source}: {self.setting} failed: {brief(error)}") from error

    def _content(self, prompt: EncodedPrompt, value: Any) -> Content:
        row = prompt.row
        if value is None:
            return row.prompt
        if prompt.chat is not None:
            return read_chat(f"{row.source}: {self.setting}", "messages", value)
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{row.source}: {self.setting} gave {str(value)[:80]!r}, but the prompt is a text and no chat; it must "
                f"give text"
            )
        return value


def context_function(config: ContextConfig, setting: str) -> Written | Siblings | None:
    """The function that `config.function` names, if it names one; `setting` is the name of `config`.

    Raises:
        ConfigError: If it is not trusted, not there, or takes other arguments, or both (row) and (row, samples).
    """
    if config.function is None:
        return None
    name = f"{setting}.function"
    if config.function == SIBLING:
        return Siblings(config.sibling, setting)
    function = imported(name, config.function, f"{setting}.trust_context", config.trust_context)
    of_row, of_samples = (_takes(function, *arguments) for arguments in (["row"], ["row", "samples"]))
    if of_row == of_samples:
        wrong = "may be called in both ways: give its arguments no defaults" if of_row else "takes other arguments"
        raise ConfigError(f"{name} is {config.function!r}, which is called with (row) or (row, samples), but {wrong}")
    if of_row and config.max_tokens is not None:
        raise ConfigError(
            f"{setting}.max_tokens is {config.max_tokens}, but {name} is {config.function!r}, which takes (row): its "
            f"prompts are known and checked before the first step; unset it"
        )
    return Written(name, function, of_samples)


def _takes(function: Any, *arguments: str) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True
