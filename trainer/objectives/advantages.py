"""Advantages of samples' tokens: what the teacher thinks of each, and what the whole sample earned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.loss import (
    centred_advantages,
    extrapolated_advantages,
    redistributed_advantages,
    reverse_kl_advantages,
)
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.reward import RewardConfig
from fastkl.trainer.data.arrays import end_to_end, pieces
from fastkl.trainer.data.samples import OURS, UNKNOWN, Sample, known_array
from fastkl.trainer.objectives.numbers import numbers_are_checked
from fastkl.trainer.objectives.segments import Segments
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.records import gather_arrays

Estimator = Callable[[Tensor, Tensor], Tensor]  # rewards [n], group numbers [n] -> advantages [n]


def set_advantages(samples: list[Sample], loss: LossConfig, given_coef: float = 1.0) -> dict[str, float]:
    """Writes A = A_env + A_KL of every counted token: the samples' `reward_advantage`, and what the teacher's scores give.

    All samples of this process stand end to end in one row; no sum crosses a sample's end. Without a teacher's log-probs
    A_KL is 0. Of a teacher with its own tokenizer, A_KL is that of the token's segment (`Sample.segments`), and 0 outside
    all of them; also that of the segments before whose ends the token decides about (`Sample.answers_back`). A token of a
    given completion has the advantage `given_coef` instead of both: −log p, weighted. The share `redistribute` of A_env is
    weighed by the teacher (`redistributed_advantages`). All processes call it. Returns metrics of the whole step.
    """
    scores = _Scores(samples)
    advantages, rewards = processes.raise_together(lambda: _parts(scores, loss))
    if loss.baseline == "mean":
        advantages = _centred(advantages, scores)
    advantages, metrics = _clipped(advantages, scores.judged, loss.advantage_clip)
    values = (advantages + rewards).where(scores.sampled, given_coef).where(scores.mask, 0.0)
    for sample, own in zip(samples, pieces(values.numpy(), scores.lengths), strict=True):
        sample.advantages = own
    return metrics


class _Scores:
    """What advantages are made of, of all tokens [n] of some samples end to end."""

    def __init__(self, samples: list[Sample]) -> None:
        self.lengths = [len(sample.ids) for sample in samples]
        self.ids = torch.repeat_interleave(torch.tensor(self.lengths, dtype=torch.long))
        self.mask = torch.from_numpy(end_to_end([sample.loss_mask for sample in samples], np.bool_))
        self.sampled = self.mask & ~torch.tensor([sample.given for sample in samples], dtype=torch.bool)[self.ids]
        self.segments = Segments(samples)
        self.judged = self.sampled & self.segments.known  # by the teacher
        self.rewards = torch.tensor([sample.reward_advantage for sample in samples])[self.ids]
        self.ours = _first_known(samples, *OURS)
        self.teacher = _first_known(samples, "teacher_logprobs", *OURS)
        self.reference = _first_known(samples, "reference_logprobs")
        self.baseline = _first_known(samples, "kl_baseline")


@numbers_are_checked()
def _parts(scores: _Scores, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """The KL's part, before the mean as a baseline and the clip, and the reward's, [n] each."""
    segments = scores.segments
    ours, theirs = segments.sums(scores.ours), segments.sums(scores.teacher)
    mask = segments.of_first(scores.mask & segments.known)
    of_kl = partial(_of_kl, scores, loss, ours, theirs, mask)
    advantages = segments.to_tokens(of_kl(loss.discount))
    if segments.look_back:
        # Their choice is where segments end, and so what these are: they answer for them too, and for no fraction of them.
        advantages = advantages + segments.to_later(of_kl(0.0))
    rewards = scores.rewards
    if loss.redistribute > 0:
        share, clip = loss.redistribute, loss.redistribute_clip
        own = segments.of_first(rewards)
        weighed = segments.to_tokens(redistributed_advantages(own, ours, theirs, mask, share=share, clip=clip))
        rewards = weighed.where(segments.known, rewards)
    return advantages, rewards


def _of_kl(scores: _Scores, loss: LossConfig, ours: Tensor, theirs: Tensor, mask: Tensor, discount: float) -> Tensor:
    """The KL's part of each segment, [m], of the segments' log-probs and which of them count, [m] each."""
    segments = scores.segments
    options: dict[str, Any] = {"coef": loss.kl_coef, "discount": discount}
    options["sequence_ids"] = segments.of_first(scores.ids)
    options["baseline"] = scores.baseline if loss.baseline == "kl" else None
    if loss.extrapolate == 1:
        return reverse_kl_advantages(ours, theirs, mask, power=loss.advantage_power, **options)
    # Of an id that the reference lacks, nothing is to go away from.
    unknown = segments.sums((scores.reference == UNKNOWN).float()) > 0
    reference = torch.where(unknown, theirs, segments.sums(scores.reference))
    return extrapolated_advantages(ours, theirs, reference, mask, extrapolate=loss.extrapolate, **options)


def _centred(advantages: Tensor, scores: _Scores) -> Tensor:
    """Less the mean over the other samples of the step, on all processes; those that nobody sampled are no part of it."""
    judged = advantages[scores.judged].double()
    parts = processes.gather([(judged.sum().item(), len(judged))])
    total, count = (sum(part[i] for rank, part in enumerate(parts) if rank != processes.rank()) for i in (0, 1))
    # What the other processes have is one more sequence: of one token, which counts as much as all of theirs.
    others = torch.tensor([[total], [count], [len(scores.lengths)]], dtype=torch.float64)
    values, weights = (
        torch.cat(pair) for pair in zip((advantages.double(), scores.judged.double()), others[:2], strict=True)
    )
    numbers = torch.cat([scores.ids, others[2].long()])
    return centred_advantages(values, weights, sequence_ids=numbers)[:-1].float()


def _clipped(advantages: Tensor, sampled: Tensor, limit: float | None) -> tuple[Tensor, dict[str, float]]:
    """Within ± limit, and the share of the step's sampled tokens that were not."""
    if limit is None:
        return advantages, {}
    beyond = (advantages.abs() > limit) & sampled
    clipped, tokens = processes.add({"clipped": int(beyond.sum()), "tokens": int(sampled.sum())}).values()
    return advantages.clamp(-limit, limit), {"advantages/clip_fraction": clipped / max(1, tokens)}


def _first_known(samples: Sequence[Sample], *fields: str) -> Tensor:
    """[n] float32 of the samples' tokens, of each sample the first of these arrays that it has; 0 without any."""
    arrays = [known_array(sample, *fields) for sample in samples]
    known = [array if len(array) else np.zeros(len(s.ids)) for array, s in zip(arrays, samples, strict=True)]
    return torch.from_numpy(end_to_end(known, np.float32))


def set_reward_advantages(samples: list[Sample], config: RewardConfig) -> dict[str, float]:
    """Writes `reward_advantage` of this process's graded samples; returns the metrics `reward/*` of the whole step.

    Groups are samples of one prompt, whichever processes have them. All processes call it.
    """
    graded = [sample for sample in samples if sample.reward is not None]
    mine = np.array([(sample.place, sample.prompt_index, sample.reward) for sample in graded], np.float64)
    everyones = np.concatenate(gather_arrays(mine.reshape(-1, 3)))
    if not len(everyones):
        return {}
    places, prompts, rewards = torch.from_numpy(everyones[everyones[:, 0].argsort(kind="stable")]).T
    _, groups = prompts.unique(return_inverse=True)
    advantages = ESTIMATORS[config.baseline](rewards, groups)
    if config.normalize:
        advantages = over_group_std(advantages, rewards, groups)
    by_place = dict(zip(places.tolist(), (config.coef * advantages).tolist(), strict=True))
    for sample in graded:
        sample.reward_advantage = by_place[sample.place]
    spread = [rewards[places].max() > rewards[places].min() for places in _members(groups)]
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
    for places in _members(groups):
        own = rewards[places]
        if own.max() > own.min():
            result[places] = function(own)
    return result


def _members(groups: Tensor) -> list[Tensor]:
    """The places of each group's members, in their order."""
    return list(groups.argsort(stable=True).split(groups.unique(return_counts=True)[1].tolist()))
