"""The guards of a run, as the loop has them: the same for all processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.sizes.flops import has_experts
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.files import read_jsonl
from fastkl.trainer.runs.folder import RunFolder
from fastkl.trainer.runs.guards.measures import measures
from fastkl.trainer.runs.guards.rules import facts_of
from fastkl.trainer.runs.guards.watch import Finding, GuardStop, Watch
from fastkl.trainer.runs.progress import ProgressBar
from fastkl.trainer.student import Student


class Guards:
    """Looks at each step on the first process. All processes call every method at the same point of the run.

    `tokenizers` are the student's and those of teachers that have another.
    """

    def __init__(self, student: Student, tokenizers: Iterable[PreTrainedTokenizerBase], folder: RunFolder) -> None:
        facts = facts_of(student.config, map(vocabulary, tokenizers), has_experts(student.model))
        self._student, self._folder, self._settings = student, folder, student.config.checkpoint
        self._watch = Watch(student.config.guards, facts, read_jsonl(folder.path / "metrics.jsonl"))
        self._findings: list[Finding] = []

    def look(self, done: int, metrics: dict[str, float], samples: list[Sample]) -> None:
        """Looks at a step, of which this process has these samples, and adds what it finds to its metrics."""
        metrics |= measures(samples)
        looked = processes.on_main(lambda: self._watch.look(done, metrics))
        self._findings = looked.findings
        metrics |= looked.metrics

    def tell(self, done: int, progress: ProgressBar) -> None:
        """Says what was found in the last step and in none before, and writes it down."""
        for found in self._findings:
            if found.is_new:
                progress.note(f"guard {found.rule}: {found.text}")
                self._folder.log("guards.jsonl", [{"step": done, "rule": found.rule, "text": found.text}])

    @property
    def stop(self) -> bool:
        """Whether the run shall end after the last step."""
        return any(found.stops for found in self._findings)

    def end(self, done: int) -> NoReturn:
        """Ends the run, of which there is a checkpoint."""
        processes.failed_first()  # one of them says so; afterwards they cannot agree any more
        self._student.accelerator.end_training()
        found = next(found for found in self._findings if found.stops)
        raise GuardStop(
            f"guard {found.rule}: {found.text}. The run was stopped with a checkpoint: the same command goes on after step "
            f"{done}; with --guards.{found.rule} warn it does not stop for this again"
        )

    @property
    def best_step(self) -> int | None:
        """After which step the best evaluation was, if its checkpoint shall be kept."""
        if self._settings.best is None:
            return None
        best = processes.on_main(lambda: self._watch.best)
        return None if best is None else best.step

    def take_best(self) -> tuple[int | None, str | None]:
        """Gives the student the weights of its best evaluation, if it shall be saved with those.

        Returns:
            After which step it has them, None if they are the last ones; and what is to be said.
        """
        best = self.best_step
        if self._settings.best != "student" or best is None:
            return None, None
        path = processes.on_main(lambda: self._folder.checkpoint_of(best))
        said = f"the best evaluation was after step {best}"
        if path is None:
            return None, f"{said}, whose checkpoint is not there: the last student is saved"
        self._student.take_weights(path)
        return best, f"{said}: its student is saved"
