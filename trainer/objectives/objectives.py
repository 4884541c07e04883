"""What the student minimises on a batch of its samples: a policy gradient, or a divergence from the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from fastkl import loss as losses
from fastkl.loss import LossOutput, Sparse
from fastkl.trainer.config.loss import SKEWED, LossConfig, ObjectiveName
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import UNKNOWN, Sample
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Teacher

DIVERGENCES: dict[ObjectiveName, Callable[..., LossOutput]] = {
    "reverse_kl": losses.reverse_kl_loss,
    "forward_kl": losses.forward_kl_loss,
    "jsd": losses.jsd_loss,
    "skewed_reverse_kl": losses.skewed_reverse_kl_loss,
    "skewed_forward_kl": losses.skewed_forward_kl_loss,
    "total_variation": losses.total_variation_loss,
}


class Objective(Protocol):
    """The loss of a batch."""

    asks_teacher: bool
    """Whether it has the teacher run in the update."""

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        """The samples apart by what cannot share a batch."""
        ...

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: int, seed: int) -> LossOutput:
        """The sum over the batch's tokens, divided by `normalizer`.

        Args:
            model: Calls a function with hidden states and head, as `FusedCausalLM` does.
            seed: That of a sparse backward.
        """
        ...


class PolicyGradient:
    """The policy-gradient surrogate of the samples' advantages (`policy_gradient_loss`)."""

    asks_teacher = False

    def __init__(self, config: LossConfig, temperature: float) -> None:
        self._config, self._temperature = config, temperature

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        return [samples]

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: int, seed: int) -> LossOutput:
        config = self._config
        old = batch.per_token("old_logprobs") if batch.samples[0].old_logprobs else None

        def function(hidden: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            return losses.policy_gradient_loss(
                hidden.flatten(0, 1)[batch.rows],
                weight,
                batch.tokens,
                batch.per_token("advantages"),
                old,
                method=config.method,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
                truncate_ratio=config.truncate_ratio,
                normalizer=normalizer,
                temperature=self._temperature,
                **backward_options(config, seed),
                **head,
            )

        return model(function, **batch.inputs)


class TopKDivergence:
    """The KL divergence to the teacher's likeliest tokens, which scoring left in the samples (`top_k_kl_loss`)."""

    asks_teacher = False

    def __init__(self, config: LossConfig, temperature: float, teachers: RoutedTeacher[Teacher]) -> None:
        self._config, self._temperature, self._teachers = config, temperature, teachers

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        return self._teachers.groups(samples)

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: int, seed: int) -> LossOutput:
        config, vocabulary = self._config, self._teachers.of(batch.samples).vocab_size
        ids, logprobs = batch.top_k()

        def function(hidden: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            cut = vocabulary if vocabulary != weight.shape[0] else None
            return losses.top_k_kl_loss(
                hidden.flatten(0, 1)[batch.rows],
                weight,
                ids,
                logprobs,
                direction=config.top_k_direction,
                tail=config.top_k_tail,
                tokens=batch.tokens if cut is None else None,
                vocab_size=cut,
                normalizer=normalizer,
                temperature=self._temperature,
                **backward_options(config, seed),
                **head,
            )

        return model(function, **batch.inputs)


class FullDivergence:
    """A divergence of whole distributions. The teacher's are hidden states and a head: no logits beyond a chunk's.

    Its forward pass is that of scoring, only later: batch by batch in the update, with its log-probs of the tokens as a
    by-product. To keep a step's hidden states from an earlier pass would take D_t numbers per token of the step and
    save nothing, since every sample is in one batch of a step.
    """

    asks_teacher = True

    def __init__(self, config: LossConfig, temperature: float, teachers: RoutedTeacher[LocalTeacher]) -> None:
        self._config, self._temperature, self._teachers = config, temperature, teachers
        self._options: dict[str, float] = {"beta": config.jsd_beta} if config.objective == "jsd" else {}
        if config.objective in SKEWED:
            self._options = {"alpha": config.skew_alpha}

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        return self._teachers.groups(samples)

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: int, seed: int) -> LossOutput:
        local = self._teachers.of(batch.samples)
        teacher, cut = local.head(batch.samples, batch.tokens.device), local.vocab_size
        known = batch.tokens < (len(teacher.weight) if cut is None else cut)

        def function(hidden: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            return DIVERGENCES[self._config.objective](
                hidden.flatten(0, 1)[batch.rows],
                weight,
                teacher.hidden,
                teacher.weight,
                tokens=batch.tokens.where(known, 0),
                vocab_size=cut,
                per_token=True,
                normalizer=normalizer,
                temperature=self._temperature,
                **self._options,
                **backward_options(self._config, seed),
                **head,
                **{f"teacher_{name}": value for name, value in teacher.options.items()},
            )

        output = model(function, **batch.inputs)
        tokens = output.per_token
        assert tokens is not None
        assert tokens.teacher_logprobs is not None
        batch.scatter(tokens.teacher_logprobs.where(known, UNKNOWN), "teacher_logprobs")
        means = {"top1_agreement": tokens.top1_agreement.mean(), "teacher_entropy": tokens.teacher_entropy.mean()}
        # Over the common ids alone, the student's log-probs are not those it sampled with.
        return output._replace(logprobs=output.logprobs if cut is None else None, metrics=output.metrics | means)


def objective(config: LossConfig, temperature: float, teachers: RoutedTeacher[Any]) -> Objective:
    """The objective that a config names."""
    if config.objective == "policy_gradient":
        return PolicyGradient(config, temperature)
    kind = TopKDivergence if config.objective == "top_k" else FullDivergence
    return kind(config, temperature, teachers)


def backward_options(config: LossConfig, seed: int) -> dict[str, Any]:
    if config.backward == "exact":
        return {}
    return {"backward": Sparse(seed) if config.sparse_error is None else Sparse(seed, config.sparse_error)}
