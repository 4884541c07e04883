"""What the settings of a step's samples ask of each other."""

from __future__ import annotations

from fastkl.trainer.config.environment import EnvironmentConfig
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.reward import RewardConfig
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.errors import require


def check_rollouts(
    sampling: SamplingConfig, loss: LossConfig, reward: RewardConfig, environment: EnvironmentConfig
) -> None:
    require(
        loss.kl_coef > 0 or reward.grader is not None or sampling.on_policy_fraction == 0,
        "loss.kl_coef is 0 and reward.grader is null: there is nothing to learn from the student's samples; name a grader "
        "or raise loss.kl_coef",
    )
    require(
        loss.objective == "policy_gradient" or reward.grader is None,
        f"reward.grader is {reward.grader!r} but loss.objective is {loss.objective}, which has no advantages; set "
        f"loss.objective to policy_gradient or reward.grader to null",
    )
    require(
        loss.objective == "policy_gradient" or sampling.given_coef == 1.0,
        f"sampling.given_coef is {sampling.given_coef} but loss.objective is {loss.objective}, which weighs all tokens "
        f"alike; leave it at 1",
    )
    _check_reward(sampling, reward, environment)
    require(
        sampling.tokens_per_step is None or environment.name is None,
        f"sampling.tokens_per_step is {sampling.tokens_per_step} but environment.name is {environment.name!r}: a "
        f"conversation is held within one step; unset one of them",
    )
    require(
        sampling.on_policy_fraction > 0 or environment.name is None,
        f"environment.name is {environment.name!r} but sampling.on_policy_fraction is 0: the student writes nothing",
    )


def _check_reward(sampling: SamplingConfig, reward: RewardConfig, environment: EnvironmentConfig) -> None:
    if reward.grader is None:
        return
    require(
        sampling.on_policy_fraction > 0,
        f"reward.grader is {reward.grader!r} but sampling.on_policy_fraction is 0: given completions are not graded; raise "
        f"it or leave reward.grader null",
    )
    require(
        reward.baseline == "none" or sampling.samples_per_prompt > 1,
        "reward.baseline is group but sampling.samples_per_prompt is 1: every sample would be its own baseline and earn 0. "
        "Raise sampling.samples_per_prompt or set reward.baseline to none",
    )
    require(
        reward.baseline == "none" or sampling.tokens_per_step is None,
        f"reward.baseline is group but sampling.tokens_per_step is {sampling.tokens_per_step}: the samples of a prompt "
        f"would end in different steps, without each other. Set reward.baseline to none or tokens_per_step to null",
    )
    require(
        reward.grader != "environment" or environment.name is not None,
        "reward.grader is environment but environment.name is null; name an environment or a grader",
    )
