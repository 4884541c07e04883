"""Advantages of samples' tokens: what the teacher thinks of each, and what the whole sample earned."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fastkl.loss import redistributed_advantages, reverse_kl_advantages
from fastkl.trainer.config.reward import RewardConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.objectives.numbers import numbers_are_checked

Estimator = Callable[[Tensor, Tensor], Tensor]  # rewards [n], group numbers [n] -> advantages [n]


@numbers_are_checked()
def set_advantages(
    samples: list[Sample],
    *,
    coef: float,
    discount: float,
    given_coef: float = 1.0,
    redistribute: float = 0.0,
    redistribute_clip: float = 0.2,
) -> None:
    """Writes A = A_env − coef Σ γᵏ d of every counted token: the samples' `reward_advantage` and the reverse KL's.

    All samples stand end to end in one row; no sum crosses a sample's end. Without a teacher's log-probs there is no KL. A
    token of a given completion has the advantage `given_coef` instead of both: −log p, weighted. The share `redistribute`
    of A_env is weighed by the teacher (`redistributed_advantages`).
    """
    if not samples:
        return
    lengths = [len(sample.ids) for sample in samples]
    own = [sample.old_logprobs or sample.sampler_logprobs or [0.0] * len(sample.ids) for sample in samples]
    teacher = [sample.teacher_logprobs or ours for sample, ours in zip(samples, own, strict=True)]
    mask = torch.tensor(list(itertools.chain(*(sample.loss_mask for sample in samples))))
    ids = torch.repeat_interleave(torch.tensor(lengths))
    ours, theirs = (torch.tensor(list(itertools.chain(*logprobs))) for logprobs in (own, teacher))
    advantages = reverse_kl_advantages(ours, theirs, mask, coef=coef, discount=discount, sequence_ids=ids)
    rewards = torch.tensor([sample.reward_advantage for sample in samples])[ids]
    if redistribute > 0:
        rewards = redistributed_advantages(rewards, ours, theirs, mask, share=redistribute, clip=redistribute_clip)
    rows = (advantages + rewards).split(lengths)
    for sample, row, counted in zip(samples, rows, mask.split(lengths), strict=True):
        values = torch.full_like(row, given_coef) if sample.given else row
        sample.advantages = values.where(counted, 0.0).tolist()


def set_reward_advantages(samples: list[Sample], config: RewardConfig) -> dict[str, float]:
    """Writes `reward_advantage` of all graded samples; returns the metrics `reward/*`. Groups are samples of one prompt."""
    graded = [sample for sample in samples if sample.reward is not None]
    if not graded:
        return {}
    rewards = torch.tensor([sample.reward for sample in graded], dtype=torch.float64)
    _, groups = torch.tensor([sample.prompt_index for sample in graded]).unique(return_inverse=True)
    advantages = ESTIMATORS[config.baseline](rewards, groups)
    if config.normalize:
        advantages = over_group_std(advantages, rewards, groups)
    for sample, advantage in zip(graded, (config.coef * advantages).tolist(), strict=True):
        sample.reward_advantage = advantage
    spread = [rewards[groups == group].max() > rewards[groups == group].min() for group in range(int(groups.max()) + 1)]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        "reward/groups_without_signal": 1.0 - sum(map(bool, spread)) / len(spread),
    }


def without_baseline(rewards: Tensor, groups: Tensor) -> Tensor:
    """r: [n] of rewards [n]. REINFORCE (Williams, "Simple statistical gradient-following algorithms", 1992)."""
    return rewards


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """r − mean of its group: [n] of rewards [n] and group numbers [n]. GRPO's baseline (Shao et al., "DeepSeekMath", 2024).

    Exactly 0 in a group of equal rewards.
    """
    return _by_group(rewards, groups, lambda own: own - own.mean())


ESTIMATORS: dict[str, Estimator] = {"none": without_baseline, "group": group_advantages}


def over_group_std(advantages: Tensor, rewards: Tensor, groups: Tensor) -> Tensor:
    """A / σ of the rewards of its group, of the population: [n]; GRPO's normalisation. A itself where all are equal."""
    return advantages / _by_group(rewards, groups, lambda own: own.std(correction=0).expand(len(own)), otherwise=1.0)


def _by_group(rewards: Tensor, groups: Tensor, function: Callable[[Tensor], Tensor], otherwise: float = 0.0) -> Tensor:
    """A function of each group's rewards; a constant where all of them are equal."""
    result = torch.full_like(rewards, otherwise)
    for group in groups.unique():
        own = groups == group
        if rewards[own].max() > rewards[own].min():
            result[own] = function(rewards[own])
    return result
