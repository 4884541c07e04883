"""The phases of the recipe: what each one begins with, what it learns from, and what differs from its config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from make import BASE, RUNS

HERE = Path(__file__).parent
Row = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """A run of `fastkl`."""

    command: Literal["sft", "distill"]
    config: str
    student: str | None  # the phase whose student goes on; None: the model as it was
    teacher: str | None = None  # the same of a teacher that is loaded
    settings: Row = field(default_factory=dict)


def _mixture(chosen: str, documents: int) -> Row:
    """So many rows of a hundred are documents of a set; the others are chats that the model wrote before."""
    chats = {"mixture.chats": "null"} if documents == 100 else {"mixture.chats.weight": 100 - documents}
    own = {"mixture.documents.data.path": RUNS / f"learned-{chosen}.jsonl", "mixture.documents.weight": documents}
    return own | chats


def _tuned(student: str | None, chosen: str, documents: int) -> Phase:
    return Phase("sft", "sft.yaml", student, settings=_mixture(chosen, documents))


def _recovered(student: str, teacher: str | None = None, **loss: str) -> Phase:
    return Phase("distill", "distill.yaml", student, teacher, {f"loss.{name}": value for name, value in loss.items()})


def _read(**loss: str) -> Phase:
    return Phase("distill", "read.yaml", None, settings={f"loss.{name}": value for name, value in loss.items()})


SAMPLED_TOKENS = {"objective": "policy_gradient", "top_k_direction": "reverse"}
PHASES = {
    "documents_100": _tuned(None, "first", 100),
    "documents_70": _tuned(None, "first", 70),
    "documents_50": _tuned(None, "first", 50),
    "recovered": _recovered("documents_100"),
    "second": _tuned("recovered", "second", 100),
    "second_recovered": _recovered("second", "recovered"),
    "read": _read(),
    "recovered_shuffled": _recovered("documents_100", control="shuffled"),
    "recovered_no_teacher": _recovered("documents_100", control="no_teacher"),
    "read_shuffled": _read(control="shuffled"),
    "read_no_teacher": _read(**SAMPLED_TOKENS, control="no_teacher"),
}


def folder(name: str, seed: int) -> Path:
    return RUNS / f"{name}-{seed}"


def needed(names: Iterable[str]) -> list[str]:
    """The phases and those they go on from, in order; all of them for no name."""
    wanted = set(names) or set(PHASES)
    for name in reversed(PHASES):  # a phase stands after those it goes on from
        if name in wanted:
            wanted |= {other for other in (PHASES[name].student, PHASES[name].teacher) if other is not None}
    return [name for name in PHASES if name in wanted]


def settings_of(name: str, seed: int) -> Row:
    """What differs from the config of a phase."""
    phase = PHASES[name]
    settings: Row = {"seed": seed, "student.path": _student(phase.student, seed), **phase.settings}
    if phase.config == "distill.yaml":
        settings["teacher.path"] = _student(phase.teacher, seed)
    return settings


def _student(phase: str | None, seed: int) -> Path:
    return BASE if phase is None else folder(phase, seed) / "student"


def template() -> str:
    """What the teacher of `read.yaml` reads."""
    text: str = yaml.safe_load((HERE / "read.yaml").read_text(encoding="utf-8"))["teacher"]["context"]["template"]
    return text
