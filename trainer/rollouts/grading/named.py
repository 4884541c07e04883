"""A grader by the name that a config gives it, ready to score rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.notes import note
from fastkl.trainer.rollouts.grading.graders import GRADERS, Grader
from fastkl.trainer.rollouts.grading.trusted import imported

RowGrader = Callable[[str, Prompt], float]
LOOKED_AT = 1000  # rows whose own answer is graded at the start
RIGHT = {"last_number": "{}", "boxed": r"\boxed{{}}"}
PATTERNS = ("math_verify", "regex:PATTERN", "reasoning_gym[:DATASET]", "function:MODULE.NAME")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class NamedGrader:
    """A score of a completion against its row, and the fields that each row must have for it."""

    name: str
    grade: RowGrader
    needs: tuple[str, ...] = ()
    right: str = ""  # how a completion gives the answer, for example "<answer>{}</answer>"; empty: that is not known

    def __call__(self, completion: str, row: Prompt) -> float:
        score = self.grade(completion, row)
        if isinstance(score, (int, float)) and math.isfinite(score):
            return float(score)
        raise ValueError(f"{row.source}: the grader {self.name} gave {score!r}; a score is a finite number")

    def check_rows(self, prompts: Sequence[EncodedPrompt], purpose: str) -> None:
        for prompt in prompts:
            for name in self.needs:
                if getattr(prompt.row, name) in (None, {}):
                    raise ConfigError(f"{prompt.row.source}: no `{name}`; {purpose} needs one in each row")
        self._remark(prompts[:LOOKED_AT], purpose)

    def _remark(self, prompts: Sequence[EncodedPrompt], purpose: str) -> None:
        """Says where even the answer itself would score 0: a word, where the grader reads numbers."""
        rows = [prompt.row for prompt in prompts] if self.right else []
        lost = [row for row in rows if self.grade(self.right.replace("{}", row.answer or ""), row) <= 0]
        if lost:
            note(
                f"{purpose}: the grader {self.name} gives 0 even to the answer itself in {len(lost)} of {len(rows)} rows, "
                f"for example {lost[0].source}: {lost[0].answer!r}; name another grader or mend these answers"
            )


def named_grader(option: str, name: str, *, trusted: bool) -> NamedGrader:
    """The grader called `name`; `option` is the setting that says so, for messages.

    Raises:
        ConfigError: For a name that is unknown, a package that is missing, a function that is not trusted.
    """
    kind, _, argument = name.partition(":")
    if trusted and kind != "function":
        raise ConfigError(f"{_trust(option)} is true but {option} is {name!r}, which is no function of yours; unset it")
    if name in GRADERS:
        return _of_answers(name, GRADERS[name], RIGHT.get(name, ""))
    if name == "math_verify":
        return _of_answers(name, _math_verify(option), r"\boxed{{}}")
    if kind == "regex" and argument:
        return _regex(option, name, argument)
    if kind == "reasoning_gym" and (argument or name == kind):
        return _reasoning_gym(option, name, argument)
    if kind == "function" and argument:
        return NamedGrader(name, imported(option, argument, _trust(option), trusted))
    raise ConfigError(f"{option} is {name!r}; known are {', '.join([*sorted(GRADERS), *PATTERNS])}")


def _trust(option: str) -> str:
    return option.replace("grader", "trust_grader")


def _of_answers(name: str, grade: Grader, right: str) -> NamedGrader:
    return NamedGrader(name, lambda completion, row: grade(completion, row.answer or ""), ("answer",), right)


def _math_verify(option: str) -> Grader:
    """Equality of mathematical expressions by the package math-verify, whose parser reads LaTeX and plain numbers."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            f"{option} is 'math_verify', which needs the package math-verify: pip install 'math-verify[antlr4_13_2]'"
        ) from error

    def grade(completion: str, answer: str) -> float:
        wanted = parse(answer if "$" in answer or r"\boxed" in answer else f"${answer}$")
        return float(bool(wanted) and verify(wanted, parse(completion)))

    return grade


def _regex(option: str, name: str, pattern: str) -> NamedGrader:
    """1 where the pattern is found; its group `answer`, if it has one, must also be the row's answer."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{option} is {name!r}, whose pattern is not a regular expression: {error}") from error
    if "answer" not in compiled.groupindex:
        return NamedGrader(name, lambda completion, row: float(compiled.search(completion) is not None))

    def grade(completion: str, row: Prompt) -> float:
        found = compiled.search(completion)
        return float(found is not None and (found["answer"] or "").strip() == (row.answer or "").strip())

    return NamedGrader(name, grade, needs=("answer",))


def _reasoning_gym(option: str, name: str, dataset: str) -> NamedGrader:
    """The verifier of a reasoning-gym data set, on what stands in the last <answer>…</answer>, else the whole text."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f"{option} is {name!r}, which needs the package: pip install reasoning-gym") from error
    verifiers: dict[str, Any] = {}

    def verifier(of: str) -> Any:
        if of not in verifiers:
            verifiers[of] = reasoning_gym.get_score_answer_fn(of)
        return verifiers[of]

    if dataset:
        try:
            verifier(dataset)
        except ValueError as error:
            raise ConfigError(f"{option} is {name!r}: {error}") from error

    def grade(completion: str, row: Prompt) -> float:
        of = dataset or str(row.metadata.get("source_dataset"))
        entry = {"question": row.prompt, "answer": row.answer, "metadata": row.metadata}
        answers = _ANSWER_TAG.findall(completion)
        return float(verifier(of)(answer=(answers[-1] if answers else completion).strip(), entry=entry))

    return NamedGrader(name, grade, ("answer", "metadata"), "<answer>{}</answer>")
