"""`teacher.context.function: sibling`: a failed sample is judged by a teacher that has read one that succeeded.

Hübotter et al., "Reinforcement Learning via Self-Distillation" (SDPO, 2026, arXiv 2601.20802). The group of a sample is all
that the student wrote to its prompt in the step. Of several successes the first is read. What the environment said of the
sample itself is read too.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastkl.trainer.config.context import SiblingConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.teachers.context.attempts import MASKED, Attempt, Told
from fastkl.trainer.teachers.context.turns import Content, asking, question

SHOWN, FEEDBACK, FALLBACK = "sibling", "feedback", "fallback"
MARKS = (SHOWN, FEEDBACK, FALLBACK, MASKED)


class Siblings:
    """As `SiblingConfig` says; `context` is the name of the settings that it is among."""

    def __init__(self, config: SiblingConfig, context: str) -> None:
        self._config = config
        self.setting = f"{context}.sibling"

    def of_attempts(self, prompt: EncodedPrompt, attempts: Sequence[Attempt]) -> list[Told]:
        """What the teacher reads before each of the completions, and which ones the loss leaves out."""
        successes = [place for place, attempt in enumerate(attempts) if self._succeeded(attempt)]
        told = []
        for place, attempt in enumerate(attempts):
            shown = next((attempts[other].text for other in successes if other != place), None)
            told.append(self._told(prompt, attempt, shown))
        return told

    def example(self, prompt: EncodedPrompt) -> Content:
        """What a teacher could read of the prompt."""
        return self._content(prompt, "a", None if self._config.feedback is None else "b")

    def _succeeded(self, attempt: Attempt) -> bool:
        return attempt.reward is not None and attempt.reward >= self._config.success

    def _told(self, prompt: EncodedPrompt, attempt: Attempt, shown: str | None) -> Told:
        if attempt.reward is None:  # given, or not finished
            return Told(None)
        if self._succeeded(attempt) and self._config.succeeded != "sibling":
            return Told(None, frozenset({MASKED} if self._config.succeeded == "mask" else ()))
        feedback = None if self._config.feedback is None else attempt.feedback
        if shown is None and feedback is None:
            return Told(None, frozenset({MASKED if self._config.alone == "mask" else FALLBACK}))
        marks = {SHOWN: shown, FEEDBACK: feedback}
        content = self._content(prompt, shown, feedback)
        return Told(content, frozenset(mark for mark, text in marks.items() if text is not None))

    def _content(self, prompt: EncodedPrompt, solution: str | None, feedback: str | None) -> Content:
        texts = {"prompt": question(prompt.row), "solution": "", "feedback": ""}
        if solution is not None:
            shown = solution if self._config.thoughts else solution.rpartition("</think>")[2]
            texts["solution"] = self._config.solution.format(text=shown.strip())
        if feedback is not None and self._config.feedback is not None:
            texts["feedback"] = self._config.feedback.format(text=feedback.strip())
        text = self._config.template.format(**texts)
        return text if prompt.chat is None else asking(prompt.row.turns, text)
