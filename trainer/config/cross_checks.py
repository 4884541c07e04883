"""What the settings of a step's samples ask of each other."""

from __future__ import annotations

from collections.abc import Mapping

from fastkl.trainer.config.context import SIBLING, ContextConfig, SiblingConfig
from fastkl.trainer.config.loss import KL_PART, LossConfig
from fastkl.trainer.config.losses.weights import weight_rule
from fastkl.trainer.config.reward import EnvironmentConfig, RewardConfig
from fastkl.trainer.config.rules import unchanged
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.errors import require


def check_rollouts(
    sampling: SamplingConfig,
    loss: LossConfig,
    reward: RewardConfig,
    environment: EnvironmentConfig,
    contexts: Mapping[str, ContextConfig],
) -> None:
    """`contexts` are those of all teachers, by the names of their settings."""
    unpaid = "reward.grader is null" if reward.grader is None else "reward.coef is 0"
    require(
        loss.kl_coef > 0 or reward.pays or sampling.on_policy_fraction == 0,
        f"loss.kl_coef is 0 and {unpaid}: there is nothing to "
        f"learn from the student's samples; name a grader with a coef above 0, or raise loss.kl_coef",
    )
    graded_for_teachers = any(context.function is not None for context in contexts.values())
    require(
        reward.grader is None or reward.coef > 0 or graded_for_teachers,
        f"reward.coef is 0 and no teacher.context has a function that could read grades: reward.grader "
        f"({reward.grader}) would have no effect; unset it or raise reward.coef",
    )
    require(
        loss.control != "shuffled" or sampling.samples_per_step > 1,
        "loss.control is shuffled, but a step has a single sample; raise sampling.prompts_per_step",
    )
    require(
        loss.redistribute == 0 or reward.pays,
        f"loss.redistribute is {loss.redistribute}, but {unpaid}: there is no reward to weigh; name a grader, or unset it",
    )
    require(
        loss.top_k_tail != "sampled" or sampling.on_policy_fraction > 0,
        "loss.top_k_tail is sampled and sampling.on_policy_fraction is 0: no token is the student's own; raise it, or set "
        "loss.top_k_tail to bucket",
    )
    if loss.objective != "policy_gradient":
        reason = (
            f"loss.objective is {loss.objective}, which has no advantages; set it to policy_gradient, or unset this"
        )
        unread = ["baseline", "normalize"] if graded_for_teachers else ["grader"]
        unchanged(reward, "reward.", reason, [*unread, *(["coef"] if reward.pays else [])])
        unchanged(sampling, "sampling.", reason, ["given_coef"])
    if sampling.on_policy_fraction == 0:
        _check_given_alone(loss)
    require(
        not sampling.steps_ahead or loss.objective != "policy_gradient" or loss.old_logprobs == "sampler",
        f"sampling.steps_ahead is {sampling.steps_ahead}: older weights write the samples, and loss.old_logprobs is "
        f"{loss.old_logprobs}, which takes the importance ratio against newer ones; set it to sampler",
    )
    require(
        loss.baseline != "mean" or sampling.samples_per_step > 1,
        "loss.baseline is mean, but a step has one sample, and the mean is that of the others; raise "
        "sampling.prompts_per_step or set loss.baseline to none",
    )
    if reward.grader is not None:
        _check_reward(sampling, reward, environment, reward.pays and loss.objective == "policy_gradient")
    for name, context in contexts.items():
        if context.function == SIBLING:
            _check_sibling(f"{name}.function is {SIBLING}", context.sibling, sampling, loss, reward, environment)
    if environment.name is not None:
        reason = f"environment.name is {environment.name!r}"
        unchanged(sampling, "sampling.", f"{reason}: a conversation ends in its step; unset one", ["tokens_per_step"])
        require(
            sampling.on_policy_fraction > 0, f"{reason}, but sampling.on_policy_fraction is 0: the student is silent"
        )


def _check_given_alone(loss: LossConfig) -> None:
    """Nothing asks for what the student's own samples alone have."""
    start = "sampling.on_policy_fraction is 0: given completions have no"
    unchanged(loss, "loss.", f"{start} KL in their advantages; unset one of them", KL_PART)
    if loss.objective == "policy_gradient":
        unchanged(
            loss, "loss.", f"{start} teacher's score that a control could replace; unset one of them", ["control"]
        )
    seen = [text for text in loss.weights if weight_rule(text).reads_gaps]
    require(
        not seen or (loss.objective == "policy_gradient" and loss.old_logprobs != "current"),
        f"loss.weights has {' and '.join(seen)}, but {start} log-probs of the student before the update under "
        f"loss.objective {loss.objective}, loss.old_logprobs {loss.old_logprobs}: every token would weigh 1; name another "
        f"rule, or raise sampling.on_policy_fraction",
    )


def check_without_teacher(loss: LossConfig) -> None:
    """Nothing asks for the log-probs of a teacher that is not there."""
    asked = [text for text in loss.weights if weight_rule(text).reads_gaps]
    require(
        not asked,
        f"loss.weights has {' and '.join(asked)}, which compares with the teacher, but the run has none; name a teacher or "
        f"another rule",
    )
    require(
        loss.forward_kl_above is None,
        f"loss.forward_kl_above is {loss.forward_kl_above}, but the run has no teacher; name one or unset it",
    )


def _check_reward(
    sampling: SamplingConfig, reward: RewardConfig, environment: EnvironmentConfig, has_advantages: bool
) -> None:
    require(
        sampling.on_policy_fraction > 0,
        f"reward.grader is {reward.grader!r}, but sampling.on_policy_fraction is 0: given completions are not graded; "
        f"raise it or leave reward.grader null",
    )
    has_groups = reward.baseline == "group" and has_advantages
    require(
        not has_groups or sampling.samples_per_prompt > 1,
        "reward.baseline is group, but sampling.samples_per_prompt is 1: every sample would be its own baseline and earn "
        "0. Raise sampling.samples_per_prompt or set reward.baseline to none",
    )
    if has_groups:
        reason = "reward.baseline is group: the samples of a prompt would end in different steps. Unset one of them"
        unchanged(sampling, "sampling.", reason, ["tokens_per_step"])
    require(
        reward.grader != "environment" or environment.name is not None,
        "reward.grader is environment, but environment.name is null; name an environment or another grader",
    )


def _check_sibling(
    reason: str,
    sibling: SiblingConfig,
    sampling: SamplingConfig,
    loss: LossConfig,
    reward: RewardConfig,
    environment: EnvironmentConfig,
) -> None:
    """There are grades, groups of whole samples, and no reward that the mask would throw away."""
    require(
        reward.grader is not None,
        f"{reason}, but reward.grader is null: nobody knows which samples succeeded; name a grader",
    )
    told = sibling.feedback is not None and environment.name is not None
    require(
        sampling.samples_per_prompt > 1 or told,
        f"{reason}, but sampling.samples_per_prompt is 1: a sample has no siblings, and no environment says anything of "
        f"it; raise sampling.samples_per_prompt",
    )
    unchanged(
        sampling, "sampling.", f"{reason}: a group would end in different steps. Unset one of them", ["tokens_per_step"]
    )
    require(
        sibling.succeeded != "mask" or not (reward.pays and loss.objective == "policy_gradient"),
        f"{reason} and sibling.succeeded is mask, but reward.coef is {reward.coef}: samples that succeeded would not be in "
        f"the loss, and nobody would earn a reward; set reward.coef to 0, or sibling.succeeded to plain or sibling",
    )


def check_servers(sampling: SamplingConfig, teachers: Mapping[str, TeacherConfig], lora_rank: int) -> None:
    """A server that gets all weights of the student is no teacher. `teachers` are all, by the names of their settings."""
    own = sampling.server.url.rstrip("/")
    both = [name for name, teacher in teachers.items() if own and teacher.server.url.rstrip("/") == own]
    require(
        not both or lora_rank > 0,
        f"{', '.join(both)}.server.url and sampling.server.url are both {own}, and student.lora.rank is 0: the student's "
        f"weights would take the place of the teacher's there. Serve the teacher elsewhere, or train an adapter "
        f"(student.lora.rank)",
    )


def check_own_tokenizers(teachers: Mapping[str, TeacherConfig], loss: LossConfig) -> None:
    """A teacher with its own tokenizer says nothing of a token of the student that it does not have: nothing asks it to.

    `teachers` are all of the run, by the names of their settings.
    """
    own = [name for name, teacher in teachers.items() if teacher.own_tokenizer]
    if not own:
        reason = "no teacher.tokenizer is own: every token is a segment; unset it"
        unchanged(loss, "loss.", reason, ["max_segment"])
        return
    setting = f"{own[0]}.tokenizer is {teachers[own[0]].tokenizer}"
    same = f"use a teacher of the student's family, and unset {own[0]}.tokenizer"
    require(
        loss.objective != "density_power",
        f"loss.objective is density_power, but {setting}: it is no function of ratios of probabilities, and has no "
        f"meaning for tokens that are one outcome together; set loss.objective to another divergence, or {same}",
    )
    if loss.objective == "top_k":
        require(
            loss.top_k_of == "teacher",
            f"loss.top_k_of is {loss.top_k_of}, but {setting}: it does not have all tokens of the student's list; set "
            f"loss.top_k_of to teacher, or {same}",
        )
        require(
            loss.top_k_tail == "bucket",
            f"loss.top_k_tail is {loss.top_k_tail}, but {setting}: what the two do not have in common is one outcome; set "
            f"loss.top_k_tail to bucket, or {same}",
        )
    whole = f"{setting}: it does not have all tokens of the student"
    require(loss.baseline != "kl", f"loss.baseline is kl, but {whole}; set loss.baseline to mean, or {same}")
    require(
        loss.forward_kl_above is None,
        f"loss.forward_kl_above is {loss.forward_kl_above}, but {whole}; unset it, or {same}",
    )
    require(
        loss.control != "shuffled",
        f"loss.control is shuffled, but {setting}: a segment's score does not fit tokens elsewhere; set loss.control to "
        f"no_teacher, or {same}",
    )
    seen = [text for text in loss.weights if not weight_rule(text).is_blind]
    require(
        not seen,
        f"loss.weights has {' and '.join(seen)}, which compares single tokens with the teacher, but {setting}: it knows "
        f"segments alone; unset one of them",
    )
