"""The training loop. On-policy distillation and supervised fine-tuning differ in where a step's samples come from alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.optim import OptimConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.data.step_metrics import as_metrics, context_gap, teacher_kl
from fastkl.trainer.errors import RunError, ServerError
from fastkl.trainer.models.precision import too_small_an_update
from fastkl.trainer.models.saving import save_student
from fastkl.trainer.objectives.base import Objective
from fastkl.trainer.rollouts.evaluation import Evaluation, evaluate
from fastkl.trainer.rollouts.single_turn import Responder
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.files import read_jsonl
from fastkl.trainer.runs.folder import RunFolder
from fastkl.trainer.runs.guards.guards import Guards
from fastkl.trainer.runs.listener import Clock, Listener
from fastkl.trainer.runs.progress import ProgressBar
from fastkl.trainer.runs.report.card import write_cards
from fastkl.trainer.runs.report.hub import upload
from fastkl.trainer.runs.report.page import NAME as REPORT
from fastkl.trainer.runs.report.page import report_of
from fastkl.trainer.runs.report.samples_log import NAME, sample_records
from fastkl.trainer.runs.sharing.samples import first_samples
from fastkl.trainer.runs.stop import Stopped, StopSignals
from fastkl.trainer.runs.trackers import start_trackers
from fastkl.trainer.student import Student


class Source(Protocol):
    """Where the samples of a step come from."""

    def samples(self, step: int, clock: Clock) -> tuple[list[Sample], dict[str, float]]:
        """This process's samples of a step, ready for the objective, and metrics of the whole step.

        The same for the same step and the same student, always. All processes call it.
        """
        ...

    def settle(self, stopping: Callable[[], bool]) -> None:
        """Before a checkpoint: waits until what is underway for later steps is there, or until the run is stopping."""
        return


def fit(
    student: Student,
    objective: Objective,
    source: Source,
    responder: Responder | None,
    tokenizer: PreTrainedTokenizerBase,
    evaluations: list[Evaluation],
    folder: RunFolder,
    listener: Listener,
    own_tokenizers: Mapping[str, PreTrainedTokenizerBase] = MappingProxyType({}),
) -> None:
    """Runs the steps that are left: samples, update, log, evaluate, checkpoint; at the end, the student and a report.

    `own_tokenizers` are those of teachers that have one, by data set.
    """
    config, checkpoint = student.config, folder.checkpoint
    if checkpoint is not None:
        student.restore(checkpoint.path)
    steps_done = None if checkpoint is None else checkpoint.steps_done
    said = folder.begin()
    start_trackers(student.accelerator, config, folder.path, steps_done)
    start = steps_done or 0
    guards = Guards(student, [tokenizer, *own_tokenizers.values()], folder)

    def grade(metrics: dict[str, float], step: int) -> None:
        if responder is not None and evaluations:
            with student.gathered():
                metrics |= evaluate(evaluations, responder, tokenizer, student.cost, config.seed, step)

    listener.on_start(start, config.optim.steps)
    with ProgressBar(config.optim.steps, start) as progress, StopSignals() as stop:
        if processes.count() > 1:
            progress.note(f"{processes.count()} processes, {'FSDP 2' if student.sharded else 'DDP'}")
        for line in said:
            progress.note(line)
        if checkpoint is None:
            metrics: dict[str, float] = {}
            if evaluations:
                answers = sum(len(one.ask.each) for one in evaluations)
                progress.note(f"writing {answers} answers to held-out prompts (eval) before the first step")
            grade(metrics, 0)
            if metrics:
                guards.look(0, metrics, [])
                _log(student, folder, 0, metrics)
                if guards.best_step == 0:
                    folder.save_checkpoint(student.save, 0, best=0)
                progress.step(0, metrics)
                listener.on_step(0, metrics, [])
        else:
            progress.note(f"resumed {config.run} after step {start}")
        for step in range(start, config.optim.steps):
            clock, done = Clock(listener, stop.check), step + 1
            with _checkpoint_at_the_end(student, folder, step, guards.best_step):
                stop.check()
                samples, metrics = source.samples(step, clock)
            with stop.postponed(), clock("train"), objective.updating():
                metrics |= student.update(samples, objective, step)
            metrics |= as_metrics(processes.gather([teacher_kl(samples) | context_gap(samples)]))
            tokens = processes.add({"all": sum(len(sample.ids) for sample in samples)})["all"]
            metrics |= {**clock.seconds, "tokens_per_second": tokens / sum(clock.seconds.values())}
            if done == config.optim.steps or (config.eval.every and done % config.eval.every == 0):
                grade(metrics, done)
            guards.look(done, metrics, samples)
            _log(student, folder, done, metrics)
            logged = first_samples(samples, config.log_samples)
            folder.log(NAME, sample_records(logged, tokenizer, done, own_tokenizers))
            progress.step(done, metrics)
            guards.tell(done, progress)
            if step == max(start, config.optim.warmup_steps - 1):  # the first at the full rate
                _remark(progress, too_small_an_update(metrics, config.optim.lr))
            listener.on_step(done, metrics, samples)
            best, ends = guards.best_step, guards.stop and done < config.optim.steps
            due = config.checkpoint.every and done % config.checkpoint.every == 0
            if due or ends or done in (config.optim.steps, best):
                source.settle(stop.told)
                folder.save_checkpoint(student.save, done, best)
            if ends:
                guards.end(done)
        _remark(progress, processes.on_main(lambda: _skipped(folder, config.optim)))
        kept, said_of_it = guards.take_best()
        _remark(progress, said_of_it)
        with student.gathered():
            written = _save_student(student, tokenizer, folder, kept)
        progress.note(f"student saved in {folder.student}")
        _remark(progress, processes.on_main(lambda: upload(config, folder.student, written)))
        if start < config.optim.steps or processes.on_main(lambda: not (folder.path / REPORT).exists()):
            progress.note(processes.on_main(lambda: report_of(folder.path)))
    listener.on_end(folder)
    student.accelerator.end_training()


@contextmanager
def _checkpoint_at_the_end(student: Student, folder: RunFolder, steps_done: int, best: int | None) -> Iterator[None]:
    """Saves the student as it is after so many steps, where the run is ended in here."""
    try:
        yield
    except ServerError:
        folder.save_checkpoint(student.save, steps_done, best)
        raise
    except Stopped as stopped:
        folder.save_checkpoint(student.save, steps_done, best)
        stopped.checkpoint = steps_done
        processes.failed_first()  # one of them says so; afterwards they cannot agree any more
        student.accelerator.end_training()
        raise


def _save_student(
    student: Student, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, kept: int | None
) -> list[str]:
    """Saves the model with its card; returns the names of the files, on the process that writes them.

    `kept`: after which step it has its weights; None: the last.
    """
    written: list[str] = []

    def write(aside: Path) -> None:
        save_student(student.model, tokenizer, aside)
        write_cards(aside, student.config, student.identity, read_jsonl(folder.path / "metrics.jsonl"), kept)
        written.extend(str(file.relative_to(aside)) for file in aside.rglob("*") if file.is_file())

    folder.save_student(write)
    return written


def _remark(progress: ProgressBar, text: str | None) -> None:
    if text is not None:
        progress.note(text)


def _skipped(folder: RunFolder, optim: OptimConfig) -> str | None:
    """What to say of the run's optimizer steps that were skipped; None where there are none.

    Raises:
        RunError: If there is no other.
    """
    rows = [row for row in read_jsonl(folder.path / "metrics.jsonl") if "optim/skipped" in row]
    skipped, steps = sum(row["optim/skipped"] for row in rows), len(rows) * optim.substeps
    if skipped == 0:
        return None
    said = f"{skipped:.0f} of {steps} optimizer steps were skipped, because their gradient was not finite"
    if skipped >= steps:
        raise RunError(f"{said}: nothing was learned. Look for what is not finite in metrics.jsonl, or lower optim.lr")
    return said


def _log(student: Student, folder: RunFolder, step: int, metrics: dict[str, float]) -> None:
    folder.log("metrics.jsonl", [{"step": step, **metrics}])
    student.accelerator.log(metrics, step=step)
