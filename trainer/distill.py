"""On-policy distillation: the student samples, the teacher scores, the student learns to be less unlike it.

Thinking Machines, "On-Policy Distillation" (2025); Tinker cookbook, recipe `distillation`.
"""

from __future__ import annotations

from typing import Any

from fastkl.trainer import checks
from fastkl.trainer.advantages import set_advantages
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.data.mixture import DataSet, step_prompts
from fastkl.trainer.data.prompts import encode_prompts, load_prompts
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.grading.evaluate import load_eval_prompts
from fastkl.trainer.loop import Clock, fit
from fastkl.trainer.models.loading import end_of_sequence, load_tokenizer
from fastkl.trainer.models.scoring import score
from fastkl.trainer.objectives import objective
from fastkl.trainer.runs.folder import RunFolder, check_run_folder
from fastkl.trainer.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.samplers.sampler import Sampler
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.opening import check_teachers, connect_servers, open_teachers
from fastkl.trainer.teachers.routed import RoutedTeacher


class OnPolicy:
    """Samples of the student's own, with what the objective takes of the teacher: log-probs and advantages, or lists."""

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        teacher: RoutedTeacher[Any],
        sampler: Sampler,
        data_sets: list[DataSet],
    ) -> None:
        self._config, self._student, self._teacher = config, student, teacher
        self._sampler, self._data_sets = sampler, data_sets

    def samples(self, step: int, clock: Clock) -> tuple[list[Sample], dict[str, float]]:
        with clock("sample"):
            samples = self._rollout(step)
        loss = self._config.loss
        if loss.objective in ("sampled", "top_k"):  # the others ask the teacher in the update
            with clock("teacher"):
                self._teacher.score(samples)
        if loss.objective == "sampled":
            with clock("old_logprobs"):
                self._set_old_logprobs(samples)
            set_advantages(samples, coef=loss.kl_coef, discount=loss.discount)
        return samples, rollout_metrics(samples)

    def _rollout(self, step: int) -> list[Sample]:
        config = self._config.sampling
        chosen = step_prompts(self._data_sets, config.prompts_per_step, step, self._config.seed)
        chosen = [prompt for prompt in chosen for _ in range(config.samples_per_prompt)]
        prompts = [data_set.prompts[row].ids for data_set, row in chosen]
        completions = self._sampler.sample(
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=self._config.seed * 1_000_003 + step,
        )
        return [
            make_sample(prompt, c.token_ids, row, c.logprobs, truncated=c.truncated, dataset=data_set.name)
            for (data_set, row), prompt, c in zip(chosen, prompts, completions, strict=True)
        ]

    def _set_old_logprobs(self, samples: list[Sample]) -> None:
        """What the importance ratio is taken against: see `LossConfig.old_logprobs`."""
        if self._config.loss.old_logprobs == "recompute":
            score(
                self._student.fused,
                samples,
                "old_logprobs",
                temperature=self._config.sampling.temperature,
                max_tokens=self._config.batch.max_tokens,
                layout=self._student.layout,
                device=self._student.device,
            )
        elif self._config.loss.old_logprobs == "sampler":
            for sample in samples:
                sample.old_logprobs = sample.sampler_logprobs


def rollout_metrics(samples: list[Sample]) -> dict[str, float]:
    """entropy is the one-sample estimate, the mean of −ℓ_sampler per token."""
    tokens = sum(sample.loss_tokens for sample in samples)
    ours = sum(sum(sample.sampler_logprobs) for sample in samples)
    return {
        "entropy": -ours / tokens,
        "completions/mean_length": tokens / len(samples),
        "completions/truncated_fraction": sum(sample.truncated for sample in samples) / len(samples),
    }


def distill(config: DistillConfig) -> RunFolder:
    """Runs (or resumes) a distillation; raises ConfigError before anything expensive if it cannot work."""
    check_run_folder(config)
    tokenizer = load_tokenizer(config.student)
    data_sets = [
        DataSet(name, entry, encode_prompts(load_prompts(entry.data), tokenizer, entry.data))
        for name, entry in config.data_sets().items()
    ]
    eval_prompts = load_eval_prompts(config.eval, tokenizer)
    check_teachers(config, tokenizer, data_sets)
    served = connect_servers(config, tokenizer, data_sets)

    student = Student(config, config.loss, config.sampling.temperature)
    teachers = open_teachers(config, tokenizer, data_sets, student, served)
    checks.check_eval_room(eval_prompts, config.eval, "student", student.model)
    student.objective = objective(config.loss, config.sampling.temperature, teachers)
    sampler = ContinuousBatchingSampler(
        student.model,
        eos_token_ids=end_of_sequence(student.model, tokenizer),
        max_batch_tokens=config.sampling.max_batch_tokens,
        max_requests=config.sampling.max_requests,
    )
    source = OnPolicy(config, student, teachers, sampler, data_sets)
    with RunFolder(config) as folder:
        fit(student, source, sampler, tokenizer, eval_prompts, folder)
    return folder
