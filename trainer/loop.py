"""The training loop. On-policy distillation and supervised fine-tuning differ in where a step's samples come from alone."""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.errors import ServerError
from fastkl.trainer.models.saving import save_student
from fastkl.trainer.objectives.base import Objective
from fastkl.trainer.rollouts.evaluation import evaluate
from fastkl.trainer.rollouts.single_turn import Responder
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.folder import RunFolder, flat_settings
from fastkl.trainer.runs.listener import Clock, Listener
from fastkl.trainer.runs.progress import ProgressBar
from fastkl.trainer.runs.report.page import report_of
from fastkl.trainer.runs.samples_log import NAME, sample_records
from fastkl.trainer.step_metrics import teacher_kl
from fastkl.trainer.student import Student


class Source(Protocol):
    """Where the samples of a step come from."""

    def samples(self, step: int, clock: Clock) -> tuple[list[Sample], dict[str, float]]:
        """All samples of a step, ready for the objective, and metrics, on every process.

        The same for the same step and the same student, always.
        """
        ...


def fit(
    student: Student,
    objective: Objective,
    source: Source,
    responder: Responder,
    tokenizer: PreTrainedTokenizerBase,
    eval_prompts: list[EncodedPrompt],
    folder: RunFolder,
    listener: Listener,
) -> None:
    """Runs the steps that are left: samples, update, log, evaluate, checkpoint; at the end, the student and a report."""
    config, start = student.config, 0
    checkpoint = folder.latest_checkpoint()
    if checkpoint is not None:
        start = checkpoint[0]
        student.restore(checkpoint[1])
    folder.rewind(start if checkpoint is not None else -1)
    student.accelerator.init_trackers("fastkl", config=flat_settings(config))

    def grade(metrics: dict[str, float]) -> None:
        if eval_prompts:
            with student.gathered():
                metrics |= evaluate(responder, tokenizer, eval_prompts, config.eval, config.seed)[0]

    listener.on_start(start, config.optim.steps)
    with ProgressBar(config.optim.steps, start) as progress:
        if processes.count() > 1:
            progress.note(f"{processes.count()} processes, {'FSDP 2' if student.sharded else 'DDP'}")
        if checkpoint is None:
            metrics: dict[str, float] = {}
            grade(metrics)
            if metrics:
                _log(student, folder, 0, metrics)
                progress.step(0, metrics)
                listener.on_step(0, metrics, [])
        else:
            progress.note(f"resumed {config.run} after step {start}")
        for step in range(start, config.optim.steps):
            clock, done = Clock(listener), step + 1
            try:
                samples, metrics = source.samples(step, clock)
            except ServerError:
                folder.save_checkpoint(student.save, step)
                raise
            with clock("train"), objective.updating():
                metrics |= student.update(samples, objective, step)
            metrics |= teacher_kl(samples)
            tokens = sum(len(sample.ids) for sample in samples)
            metrics |= {**clock.seconds, "tokens_per_second": tokens / sum(clock.seconds.values())}
            if done == config.optim.steps or (config.eval.every and done % config.eval.every == 0):
                grade(metrics)
            _log(student, folder, done, metrics)
            folder.log(NAME, sample_records(samples[: config.log_samples], tokenizer, done))
            progress.step(done, metrics)
            listener.on_step(done, metrics, samples)
            if done == config.optim.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                folder.save_checkpoint(student.save, done)
        with student.gathered():
            folder.save_student(lambda aside: save_student(student.model, tokenizer, aside))
        progress.note(f"student saved in {folder.student}")
        if start < config.optim.steps:  # a finished run is left as it is
            progress.note(processes.on_main(lambda: report_of(folder.path)))
    listener.on_end(folder)
    student.accelerator.end_training()


def _log(student: Student, folder: RunFolder, step: int, metrics: dict[str, float]) -> None:
    folder.log("metrics.jsonl", [{"step": step, **metrics}])
    student.accelerator.log(metrics, step=step)
