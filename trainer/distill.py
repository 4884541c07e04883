"""On-policy distillation: the student samples, the teacher scores, the student learns from the reverse KL.

Thinking Machines, "On-Policy Distillation" (2025); Tinker cookbook, recipe `distillation`.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fastkl.trainer import checks
from fastkl.trainer.advantages import set_advantages
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.prompts import EncodedPrompt, batch_indices, encode_prompts, load_prompts
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.flops import sampling_flops
from fastkl.trainer.grading.evaluate import load_eval_prompts
from fastkl.trainer.loop import Clock, fit
from fastkl.trainer.models.loading import end_of_sequence, fuse, load_teacher, load_teacher_tokenizer, load_tokenizer
from fastkl.trainer.models.scoring import score
from fastkl.trainer.runs.folder import RunFolder, check_run_folder
from fastkl.trainer.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.samplers.sampler import Sampler
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import ServedTeacher, connect
from fastkl.trainer.teachers.teacher import Teacher


class OnPolicy:
    """Samples of the student's own, with the advantages the teacher's scores give them."""

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        teacher: Teacher,
        sampler: Sampler,
        prompts: list[EncodedPrompt],
    ) -> None:
        self._config, self._student, self._teacher = config, student, teacher
        self._sampler, self._prompts = sampler, prompts

    def samples(self, step: int, clock: Clock) -> tuple[list[Sample], dict[str, float]]:
        with clock("sample"):
            samples = self._rollout(step)
        with clock("teacher"):
            self._teacher.score(samples)
        with clock("old_logprobs"):
            self._set_old_logprobs(samples)
        set_advantages(samples, coef=self._config.loss.kl_coef, discount=self._config.loss.discount)
        flops = {"flops/sampling": sampling_flops(self._student.cost, samples)} | self._teacher.flops(samples)
        return samples, rollout_metrics(samples) | flops

    def _rollout(self, step: int) -> list[Sample]:
        config = self._config.sampling
        chosen = batch_indices(len(self._prompts), config.prompts_per_step, step, self._config.seed)
        chosen = [index for index in chosen for _ in range(config.samples_per_prompt)]
        completions = self._sampler.sample(
            [self._prompts[index].ids for index in chosen],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=self._config.seed * 1_000_003 + step,
        )
        return [
            make_sample(self._prompts[index].ids, c.token_ids, index, c.logprobs, truncated=c.truncated)
            for index, c in zip(chosen, completions, strict=True)
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
    """teacher_kl and entropy are the one-sample estimates: means of ℓ_sampler − ℓ_teacher and of −ℓ_sampler per token."""
    tokens = sum(sample.loss_tokens for sample in samples)
    ours = sum(sum(sample.sampler_logprobs) for sample in samples)
    theirs = sum(sum(sample.teacher_logprobs) for sample in samples)
    return {
        "teacher_kl": (ours - theirs) / tokens,
        "entropy": -ours / tokens,
        "completions/mean_length": tokens / len(samples),
        "completions/truncated_fraction": sum(sample.truncated for sample in samples) / len(samples),
    }


def distill(config: DistillConfig) -> RunFolder:
    """Runs (or resumes) a distillation; raises ConfigError before anything expensive if it cannot work."""
    check_run_folder(config)
    tokenizer, teacher_tokenizer = load_tokenizer(config.student), load_teacher_tokenizer(config.teacher)
    prompts = encode_prompts(load_prompts(config.data), tokenizer, config.data)
    eval_prompts = load_eval_prompts(config.eval, tokenizer)
    if teacher_tokenizer is not None:
        checks.check_tokenizers(tokenizer, teacher_tokenizer)
        checks.check_chat(tokenizer, teacher_tokenizer, prompts, config.data.chat_template)
    served = _connect(config, tokenizer, prompts) if config.teacher.server.url else None

    student = Student(config, config.loss, config.sampling.temperature)
    teacher = served or _load(config, student)
    _check_models(config, student, teacher, tokenizer, prompts, eval_prompts)
    sampler = ContinuousBatchingSampler(
        student.model,
        eos_token_ids=end_of_sequence(student.model, tokenizer),
        max_batch_tokens=config.sampling.max_batch_tokens,
        max_requests=config.sampling.max_requests,
    )
    source = OnPolicy(config, student, teacher, sampler, prompts)
    with RunFolder(config) as folder:
        fit(student, source, sampler, tokenizer, eval_prompts, folder)
    return folder


def _connect(config: DistillConfig, tokenizer: PreTrainedTokenizerBase, prompts: list[EncodedPrompt]) -> ServedTeacher:
    longest = max((prompt.ids for prompt in prompts), key=len)
    return connect(
        config.teacher,
        tokenizer,
        temperature=config.sampling.temperature,
        longest=longest + [PAD_ID] * config.sampling.max_new_tokens,
        remedy=checks.SHORTER.format("sampling", "data"),
    )


def _load(config: DistillConfig, student: Student) -> LocalTeacher:
    fused = fuse(load_teacher(config.teacher, student.device), "teacher")
    return LocalTeacher(fused, config.batch, config.sampling.temperature, student.device)


def _check_models(
    config: DistillConfig,
    student: Student,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[EncodedPrompt],
    eval_prompts: list[EncodedPrompt],
) -> None:
    """Those that are loaded here: a server has been checked by asking it."""
    local = teacher.model if isinstance(teacher, LocalTeacher) else None
    models = {"student": student.model} | ({} if local is None else {"teacher": local})
    checks.check_vocabulary(tokenizer, models)
    checks.check_end_of_sequence(student.model, local, tokenizer)
    checks.check_room(prompts, config.sampling.max_new_tokens, models, checks.SHORTER.format("sampling", "data"))
    checks.check_eval_room(eval_prompts, config.eval, "student", student.model)
