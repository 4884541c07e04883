"""What samples say of their own health: numbers that guards and `fastkl probe` judge."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.data.samples import OURS, Sample, known_array
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.ranked import ranked

TOP = 0.01  # the share of the tokens that are looked at alone
FEWEST = 200  # tokens of which 1 % say something
LOOP = 16  # a loop has at least so many tokens, and goes round three times
LONGEST_PERIOD = 64


def measures(samples: Sequence[Sample]) -> dict[str, float]:
    """The metrics that guards look at, of all processes' samples that the student wrote. All processes call it."""
    own = [sample for sample in samples if len(sample.sampler_logprobs) and not sample.given]
    advantages, loops = counted(own, "advantages"), sum(map(is_cut_loop, own))
    known, told = len(advantages), int(advantages.any())
    sums = processes.add({"samples": len(own), "loops": loops, "advantages": known, "not 0": told})
    if not sums["samples"]:
        return {}
    found = {"completions/looping_fraction": sums["loops"] / sums["samples"], **teacher_spread(own)}
    if sums["advantages"] >= FEWEST and sums["not 0"]:
        found["advantages/top_share"] = top_share(advantages * counted_weights(own))
    return found


def teacher_spread(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean and standard deviation of the teacher's log-probs; of several data sets, of the one whose vary least.

    Of the samples of all processes, which all call it.
    """
    moments = []
    for name in sorted({sample.dataset for sample in samples}):
        scores = np.concatenate(
            [sample.teacher_scores for sample in samples if sample.dataset == name], dtype=np.float64
        )
        if len(scores):
            moments.append((name, len(scores), float(scores.mean()), float(scores.var())))
    spreads = []
    for _, own in itertools.groupby(sorted(processes.gather(moments)), key=lambda each: each[0]):
        counts, means, variances = np.array([numbers for _, *numbers in own]).T
        mean = np.average(means, weights=counts)
        if counts.sum() > 1:
            variance = np.average(variances + (means - mean) ** 2, weights=counts)
            spreads.append((float(np.sqrt(variance)), float(mean)))
    if not spreads:
        return {}
    std, mean = min(spreads)
    return {"teacher_logprobs/mean": mean, "teacher_logprobs/std": std}


def counted(samples: Sequence[Sample], *fields: str) -> Array:
    """An array's values at the tokens that count, end to end, of the samples that have it: the first of some arrays."""
    known = [(sample, array) for sample in samples if len(array := known_array(sample, *fields))]
    return np.concatenate([array[sample.loss_mask] for sample, array in known] or [np.empty(0)]).astype(np.float64)


def counted_weights(samples: Sequence[Sample]) -> Array | float:
    """`loss.weights` at the tokens that count; 1 where there are none."""
    return counted(samples, "weights") if samples and len(samples[0].weights) else 1.0


def gaps(sample: Sample) -> Array:
    """d = ℓ_student − ℓ_teacher of the tokens that a teacher judges; empty where one of them is not known."""
    ours, theirs = known_array(sample, *OURS), sample.teacher_logprobs
    if not len(ours) or not len(theirs):
        return np.empty(0)
    return (ours - theirs)[sample.scored].astype(np.float64)


def top_share(values: Array) -> float:
    """Σ|v| over the 1 % of all processes' values that are largest, divided by Σ|v|; 0 where all are 0. All call it."""
    sizes = np.abs(values).astype(np.float32)
    count, total = processes.add({"count": len(sizes), "sum": float(sizes.sum(dtype=np.float64))}).values()
    if not total > 0:
        return 0.0
    wanted = int(np.ceil(TOP * count))
    limit = ranked(sizes, [int(count) - wanted])[0]
    beyond = sizes[sizes > limit]
    more, top = processes.add({"count": len(beyond), "sum": float(beyond.sum(dtype=np.float64))}).values()
    return float((top + (wanted - more) * limit) / total)


def is_cut_loop(sample: Sample) -> bool:
    """Whether a completion reached the length limit while it repeated itself."""
    return sample.truncated and repeats(sample.ids[sample.prompt_length :])


def repeats(ids: Array) -> bool:
    """Whether ids end with a cycle that goes round at least three times, over at least LOOP of them."""
    tail = ids[-4 * LONGEST_PERIOD :]
    for period in range(1, min(LONGEST_PERIOD, len(tail) // 3) + 1):
        differs = np.flatnonzero(tail[period:] != tail[:-period])
        same = len(tail) - (int(differs[-1]) + 1 if len(differs) else 0)
        if same >= max(LOOP, 3 * period):
            return True
    return False
