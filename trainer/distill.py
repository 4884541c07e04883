"""On-policy distillation: the student samples, the teacher scores, the student learns from the reverse KL.

Thinking Machines, "On-Policy Distillation" (2025); Tinker cookbook, recipe `distillation`.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fastkl.trainer import checks
from fastkl.trainer.advantages import set_advantages, set_reward_advantages
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.prompts import EncodedPrompt, batch_indices, encode_prompts, given_samples, load_prompts
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.grading.evaluate import load_eval_prompts
from fastkl.trainer.loop import Clock, fit
from fastkl.trainer.models.loading import (
    context_length,
    end_of_sequence,
    fuse,
    load_teacher,
    load_teacher_tokenizer,
    load_tokenizer,
)
from fastkl.trainer.models.scoring import score
from fastkl.trainer.rollouts.conversations import MultiTurn, stop_ids
from fastkl.trainer.rollouts.environments import Environment, make_environment
from fastkl.trainer.rollouts.lengths import kept
from fastkl.trainer.rollouts.reward import make_judge
from fastkl.trainer.rollouts.rollout import Rollouts
from fastkl.trainer.rollouts.writer import SingleTurn, Writer
from fastkl.trainer.runs.folder import RunFolder, check_run_folder
from fastkl.trainer.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.samplers.sampler import Sampler
from fastkl.trainer.samplers.served import SamplingServer, ServedSampler, connect_sampling
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import ServedTeacher, connect
from fastkl.trainer.teachers.teacher import Teacher


class OnPolicy:
    """Samples of a step, with the advantages that the teacher's scores and the rewards give them."""

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        teacher: Teacher | None,
        sampler: Sampler,
        rollouts: Rollouts,
        prompts: int,
    ) -> None:
        self._config, self._student, self._teacher = config, student, teacher
        self._sampler, self._rollouts, self._prompts = sampler, rollouts, prompts
        student.accelerator.register_for_checkpointing(rollouts)

    def samples(self, step: int, clock: Clock) -> tuple[list[Sample], dict[str, float]]:
        with clock("push_weights"):
            self._sampler.refresh()
        with clock("sample"):
            written = self._rollout(step)
            metrics = set_reward_advantages(written, self._config.reward)
            samples = kept(written, self._config.sampling)
        with clock("teacher"):
            if self._teacher is not None:
                self._teacher.score(samples)
        with clock("old_logprobs"):
            self._set_old_logprobs(samples)
        set_advantages(
            samples,
            coef=self._config.loss.kl_coef,
            discount=self._config.loss.discount,
            given_coef=self._config.sampling.given_coef,
        )
        self._rollouts.keep(samples)  # nothing can fail any more: a checkpoint holds the state between two steps
        if self._config.sampling.filters:
            metrics["completions/dropped_fraction"] = 1 - len(samples) / len(written)
        return samples, rollout_metrics(samples) | metrics

    def _rollout(self, step: int) -> list[Sample]:
        chosen = batch_indices(self._prompts, self._config.sampling.prompts_per_step, step, self._config.seed)
        return self._rollouts.samples(chosen, step, self._config.seed * 1_000_003 + step)

    def _set_old_logprobs(self, samples: list[Sample]) -> None:
        """What the importance ratio is taken against: see `LossConfig.old_logprobs`.

        No sampler wrote the given completions: their ratio is taken against the policy as it is before the update.
        """
        method = self._config.loss.old_logprobs
        scored = samples if method == "recompute" else [s for s in samples if s.given and method == "sampler"]
        score(
            self._student.fused,
            scored,
            "old_logprobs",
            temperature=self._config.sampling.temperature,
            max_tokens=self._config.batch.max_tokens,
            layout=self._student.layout,
            device=self._student.device,
        )
        for sample in samples:
            if sample.given:
                sample.sampler_logprobs = sample.old_logprobs or [0.0] * len(sample.ids)
            elif method == "sampler":
                sample.old_logprobs = sample.sampler_logprobs


def rollout_metrics(samples: list[Sample]) -> dict[str, float]:
    """teacher_kl and entropy are the one-sample estimates: means of ℓ_sampler − ℓ_teacher and of −ℓ_sampler per token.

    On given completions, `given/nll` is the student's −ℓ per token, and `given/forward_kl` the mean of ℓ_teacher − ℓ: the
    one-sample estimate of the forward KL, if the teacher wrote them.
    """
    metrics = {}
    own, given = ([sample for sample in samples if sample.given == kind] for kind in (False, True))
    if own:
        metrics["entropy"] = -_mean(own, "sampler_logprobs")
        if own[0].teacher_logprobs:
            metrics["teacher_kl"] = _mean(own, "sampler_logprobs") - _mean(own, "teacher_logprobs")
        metrics["completions/mean_length"] = sum(sample.loss_tokens for sample in own) / len(own)
        metrics["completions/truncated_fraction"] = sum(sample.truncated for sample in own) / len(own)
    if given and given[0].old_logprobs:
        metrics["given/nll"] = -_mean(given, "old_logprobs")
        if given[0].teacher_logprobs:
            metrics["given/forward_kl"] = _mean(given, "teacher_logprobs") - _mean(given, "old_logprobs")
    return metrics


def _mean(samples: list[Sample], field: str) -> float:
    """Per token that counts; the lists are 0 elsewhere."""
    tokens = sum(sample.loss_tokens for sample in samples)
    return sum(sum(getattr(sample, field)) for sample in samples) / tokens


def distill(config: DistillConfig) -> RunFolder:
    """Runs (or resumes) a distillation; raises ConfigError before anything expensive if it cannot work."""
    check_run_folder(config)
    tokenizer = load_tokenizer(config.student)
    teacher_tokenizer = load_teacher_tokenizer(config.teacher) if config.has_teacher else None
    prompts = encode_prompts(load_prompts(config.data), tokenizer, config.data)
    given = given_samples(prompts, tokenizer) if config.sampling.on_policy_fraction < 1 else []
    eval_prompts = load_eval_prompts(config.eval, tokenizer)
    environment = make_environment(config.environment)
    judge = make_judge(config.reward, tokenizer, environment, prompts)
    if teacher_tokenizer is not None:
        checks.check_tokenizers(tokenizer, teacher_tokenizer)
        checks.check_chat(tokenizer, teacher_tokenizer, prompts, config.data.chat_template)
    served = _connect(config, tokenizer, prompts, given) if config.teacher.server.url else None
    sampling_server = connect_sampling(config, tokenizer, prompts, eval_prompts) if config.sampling.server.url else None

    student = Student(config, config.loss, config.sampling.temperature)
    teacher = served or (_load(config, student) if config.has_teacher else None)
    _check_models(config, student, teacher, tokenizer, prompts, given, eval_prompts)
    ends = end_of_sequence(student.model, tokenizer)
    sampler = _sampler(config, student, [*ends, *stop_ids(environment, tokenizer)], sampling_server)
    writer = _writer(config, student, tokenizer, sampler, environment)
    rollouts = Rollouts(config.sampling, writer, prompts, given, judge)
    source = OnPolicy(config, student, teacher, sampler, rollouts, len(prompts))
    with RunFolder(config) as folder:
        fit(student, source, writer, tokenizer, eval_prompts, folder)
    return folder


def _writer(
    config: DistillConfig,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    environment: Environment | None,
) -> Writer:
    ends, context = end_of_sequence(student.model, tokenizer), context_length(student.model)
    if environment is None:
        return SingleTurn(sampler, context)
    return MultiTurn(sampler, tokenizer, environment, config.environment, ends, context)


def _connect(
    config: DistillConfig, tokenizer: PreTrainedTokenizerBase, prompts: list[EncodedPrompt], given: list[Sample]
) -> ServedTeacher:
    full = [prompt.ids + [PAD_ID] * config.sampling.max_new_tokens for prompt in prompts]
    longest = max([*full, *(sample.ids for sample in given)], key=len)
    return connect(
        config.teacher,
        tokenizer,
        temperature=config.sampling.temperature,
        longest=longest,
        remedy=checks.SHORTER.format("sampling", "data"),
    )


def _sampler(config: DistillConfig, student: Student, ends: list[int], server: SamplingServer | None) -> Sampler:
    if server is not None:
        return ServedSampler(server, student, ends)
    return ContinuousBatchingSampler(
        student.model,
        eos_token_ids=ends,
        max_batch_tokens=config.sampling.max_batch_tokens,
        max_requests=config.sampling.max_requests,
    )


def _load(config: DistillConfig, student: Student) -> LocalTeacher:
    fused = fuse(load_teacher(config.teacher, student.device), "teacher")
    return LocalTeacher(fused, config.batch, config.sampling.temperature, student.device)


def _check_models(
    config: DistillConfig,
    student: Student,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[EncodedPrompt],
    given: list[Sample],
    eval_prompts: list[EncodedPrompt],
) -> None:
    """Those that are loaded here: a server has been checked by asking it."""
    local = teacher.model if isinstance(teacher, LocalTeacher) else None
    models = {"student": student.model} | ({} if local is None else {"teacher": local})
    checks.check_vocabulary(tokenizer, models)
    checks.check_end_of_sequence(student.model, local, tokenizer)
    checks.check_room(prompts, config.sampling.max_new_tokens, models, checks.SHORTER.format("sampling", "data"))
    if given:
        checks.check_room(prompts, [sample.loss_tokens for sample in given], models, checks.SHORTER_ROW)
    checks.check_eval_room(eval_prompts, config.eval, "student", student.model)
