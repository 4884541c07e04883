"""`loss.weights`: how much each token counts, by rules that a config names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from fastkl.trainer.errors import ConfigError, require


class Number(NamedTuple):
    """What a rule's number is called, and what it may be: in words, and as a check."""

    called: str
    says: str
    fits: Callable[[float], bool]


NUMBERS = {
    "skip_first": Number("N", "a whole number from 1 on", lambda number: number >= 1 and number.is_integer()),
    "top_gap": Number("SHARE", "above 0 and at most 1", lambda number: 0 < number <= 1),
    "tip": Number("SHARE", "above 0 and at most 1", lambda number: 0 < number <= 1),
    "drift": Number("GAMMA", "0 or more, and finite", lambda number: 0 <= number < math.inf),
}
FUNCTION = "function"
FORMS = (*(f"{name}:{number.called}" for name, number in NUMBERS.items()), f"{FUNCTION}:MODULE.NAME")


class WeightRule(NamedTuple):
    """One of `loss.weights`."""

    name: str  # of NUMBERS, or FUNCTION
    number: float = 0.0
    path: str = ""  # of a function

    @property
    def reads_gaps(self) -> bool:
        """Whether it looks at the teacher's log-probs."""
        return self.name in ("top_gap", "tip", "drift")

    @property
    def reads_entropies(self) -> bool:
        """Whether it looks at the student's entropies, which cost a forward pass."""
        return self.name == "tip"

    @property
    def needs_all(self) -> bool:
        """Whether the weights of a sample depend on other samples; of a function they may."""
        return self.name in ("top_gap", "tip", FUNCTION)

    @property
    def is_blind(self) -> bool:
        """Whether it cannot look at them; a function may."""
        return not self.reads_gaps and self.name != FUNCTION

    def __str__(self) -> str:
        return f"{self.name}:{self.path or f'{self.number:g}'}"


def weight_rule(text: str) -> WeightRule:
    """The rule that a text names.

    Raises:
        ConfigError: For an unknown name, and for a number that is none or does not fit.
    """
    name, _, argument = text.partition(":")
    if name == FUNCTION and argument:
        return WeightRule(name, path=argument)
    if name not in NUMBERS:
        raise ConfigError(f"loss.weights has {text!r}; known are {', '.join(FORMS)}")
    number = NUMBERS[name]
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    require(
        number.fits(value), f"loss.weights has {text!r}; {number.called} of {name}:{number.called} is {number.says}"
    )
    return WeightRule(name, value)
