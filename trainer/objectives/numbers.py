"""What the losses refuse because of its numbers ends a run in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastkl.loss import BadNumbers
from fastkl.trainer.errors import RunError


@contextmanager
def numbers_are_checked() -> Iterator[None]:
    """A RunError for log-probs, or what a teacher gives, that no update can be made of."""
    try:
        yield
    except BadNumbers as error:
        raise RunError(f"no update can be made of this step's samples: {error}") from error
