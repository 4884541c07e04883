"""Advantages over segments against their formulas, written out in loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.objectives.controls import with_scores

REWARD = 0.75
# Segments of the completion; 0: of none. The tokens of the last but one are a reply.
SEGMENTS = [[1, 1, 2, 0, 0, 3, 4, 4, 4], [1, 2, 3, 4], [0, 0, 0], [1, 1, 1]]
REPLY = 6
BACK = [[0, 0, 2, 1, 0, 5, 0, 1, 3], [0, 1, 2, 1], [0, 1, 2], []]  # over tokens of none, into the middle of a segment


def make_samples(with_segments: bool = True) -> list[Sample]:
    """After a prompt of two tokens each; the last has no segments, as with a teacher that reads the student's tokens."""
    random, samples = np.random.default_rng(0), []
    for number, places in enumerate(SEGMENTS):
        n = len(places)
        mask = [False, False, *(number > 0 or place < REPLY for place in range(n))]
        scores = {
            f"{who}_logprobs": [0, 0, *(-random.exponential(size=n) * np.array(mask[2:]))]
            for who in ("sampler", "teacher", "reference")
        }
        sample = Sample(np.arange(n + 2), mask, number, completion_length=n, reward_advantage=REWARD, **scores)
        if with_segments and number < 3:
            sample.segments = np.array([0, 0, *places])
        samples.append(sample)
    return samples


def parts(sample: Sample) -> list[list[int]]:
    """The segments in order, as places of tokens; a token of none is one by itself."""
    numbers, found = sample.segments if len(sample.segments) else 1 + np.arange(len(sample.ids)), list[list[int]]()
    for place, number in enumerate(numbers):
        if number and found and numbers[found[-1][0]] == number:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def judged(sample: Sample, part: list[int]) -> bool:
    return bool(sample.loss_mask[part[0]]) and (not len(sample.segments) or sample.segments[part[0]] > 0)


def sums(sample: Sample, who: str, part: list[int]) -> float:
    return float(sum(getattr(sample, f"{who}_logprobs")[place].astype(np.float64) for place in part))


def d(sample: Sample, part: list[int]) -> float:
    return sums(sample, "sampler", part) - sums(sample, "teacher", part)


def power(sample: Sample, part: list[int]) -> float:
    return (math.exp(2 * sums(sample, "sampler", part)) - math.exp(2 * sums(sample, "teacher", part))) / 2


def beyond(sample: Sample, part: list[int]) -> float:
    p, q, r = (sums(sample, who, part) for who in ("sampler", "teacher", "reference"))
    return (p - r) - 1.5 * (q - r)


def kl_part(sample: Sample, score: Callable[[Sample, list[int]], float] = d, discount: float = 0.0) -> list[float]:
    """−Σ_k γᵏ d of the k-th next segment, of each token; one that nobody judges takes its step and has 0 itself.

    A token that answers for some before it has −d of the segments from there to its own too.
    """
    own = parts(sample)
    values = [score(sample, part) if judged(sample, part) else 0.0 for part in own]
    found = [0.0] * len(sample.ids)
    for first, part in enumerate(own):
        if judged(sample, part):
            for place in part:
                found[place] = -sum(discount**k * value for k, value in enumerate(values[first:]))
            for place in part if len(sample.answers_back) else ():
                since = next(i for i, each in enumerate(own) if place - sample.answers_back[place] in each)
                found[place] -= sum(values[since:first])  # 0 of a token in no segment
    return found


CASES: dict[str, tuple[dict[str, Any], Callable[[Sample], list[float]]]] = {
    "plain": ({}, kl_part),
    "coef": ({"kl_coef": 2.0}, lambda sample: [2 * each for each in kl_part(sample)]),
    "discount": ({"discount": 0.5}, lambda sample: kl_part(sample, d, 0.5)),
    "power": ({"advantage_power": 2.0, "discount": 0.9}, lambda sample: kl_part(sample, power, 0.9)),
    "extrapolate": ({"extrapolate": 1.5}, lambda sample: kl_part(sample, beyond)),
    "clip": ({"advantage_clip": 0.5}, lambda sample: [min(0.5, max(-0.5, each)) for each in kl_part(sample)]),
}


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("options", "formula"), CASES.values(), ids=CASES)
def test_the_tokens_of_a_segment_share_its_advantage(
    options: dict[str, Any], formula: Callable[[Sample], list[float]], back: bool
) -> None:
    samples = make_samples()
    for sample, own in zip(samples, BACK, strict=True):
        sample.answers_back = [0, 0, *own] if back and own else []
    set_advantages(samples, LossConfig(**options))
    for sample in samples:
        wanted = [(each + REWARD) * counts for each, counts in zip(formula(sample), sample.loss_mask, strict=True)]
        assert sample.advantages.tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_mean_of_others_is_that_of_judged_tokens() -> None:
    samples = make_samples()
    set_advantages(samples, LossConfig(baseline="mean"))
    own = [kl_part(sample) for sample in samples]
    known = [[judged(sample, [place]) for place in range(len(sample.ids))] for sample in samples]
    for number, sample in enumerate(samples):
        others = [
            value
            for other in range(len(samples))
            for value, counts in zip(own[other], known[other], strict=True)
            if other != number and counts
        ]
        mean = sum(others) / len(others)
        wanted = [
            (value - mean * judged_here + REWARD) * counts
            for value, judged_here, counts in zip(own[number], known[number], sample.loss_mask, strict=True)
        ]
        assert sample.advantages.tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_reward_that_segments_weigh() -> None:
    """RLSD's factor of a token is that of its segment; where there is none, the reward stays as it is."""
    samples = make_samples()
    set_advantages(samples, LossConfig(kl_coef=0.0, redistribute=0.5, redistribute_clip=0.3))
    for sample in samples:
        wanted = [REWARD * counts for counts in sample.loss_mask]
        for part in parts(sample):
            for place in part if judged(sample, part) else ():
                wanted[place] = REWARD * (0.5 + 0.5 * min(1.3, max(0.7, math.exp(-d(sample, part)))))
        assert sample.advantages.tolist() == pytest.approx(wanted, abs=1e-5)


def test_segments_of_single_tokens_change_no_bit() -> None:
    plain, alone = make_samples(with_segments=False), make_samples(with_segments=False)
    for sample in alone:
        sample.segments = np.array([0, 0, *range(1, len(sample.ids) - 1)])
    for options in ({"discount": 0.5}, {"baseline": "mean"}, {"extrapolate": 1.5}, {"redistribute": 0.5}):
        for samples in (plain, alone):
            set_advantages(samples, LossConfig(**options))
        assert [s.advantages.tolist() for s in plain] == [s.advantages.tolist() for s in alone]


def test_a_penalty_in_the_teachers_place_is_for_tokens() -> None:
    config = LossConfig(control="no_teacher", control_share=0.3)
    found = [with_scores(make_samples(with_segments), config) for with_segments in (True, False)]
    for judged_samples in found:
        set_advantages(judged_samples, config)
    assert [s.advantages.tolist() for s in found[0]] == [s.advantages.tolist() for s in found[1]]
