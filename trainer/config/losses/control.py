"""`loss.control`: a run that shows whether the teacher mattered."""

from __future__ import annotations

from typing import Literal

Control = Literal["shuffled", "no_teacher"]

SAYS: dict[Control, str] = {
    "shuffled": "each token is judged by the teacher's score of another sample's",
    "no_teacher": "a fixed penalty on the student's unlikeliest tokens is in the teacher's place",
}


def remark(control: str | None) -> str | None:
    """What to say of a run that is one."""
    return None if control not in SAYS else f"a control (loss.control: {control}): {SAYS[control]}"
