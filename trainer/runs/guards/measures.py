"""What samples say of their own health: numbers that guards and `fastkl probe` judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.data.samples import OURS, Sample, known_array

TOP = 0.01  # the share of the tokens that are looked at alone
FEWEST = 200  # tokens of which 1 % say something
LOOP = 16  # a loop has at least so many tokens, and goes round three times
LONGEST_PERIOD = 64


def measures(samples: Sequence[Sample]) -> dict[str, float]:
    """The metrics that guards look at, of the samples that the student wrote."""
    own = [sample for sample in samples if len(sample.sampler_logprobs) and not sample.given]
    if not own:
        return {}
    found = {"completions/looping_fraction": sum(map(is_cut_loop, own)) / len(own)}
    found |= teacher_spread(own)
    advantages = counted(own, "advantages")
    if len(advantages) >= FEWEST and advantages.any():
        found["advantages/top_share"] = top_share(advantages * counted_weights(own))
    return found


def teacher_spread(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean and standard deviation of the teacher's log-probs; of several data sets, of the one whose vary least."""
    spreads = []
    for name in sorted({sample.dataset for sample in samples}):
        scores = [sample.teacher_scores for sample in samples if sample.dataset == name]
        values = np.concatenate(scores).astype(np.float64)
        if len(values) > 1:
            spreads.append((float(values.std()), float(values.mean())))
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
    """Σ|v| over the 1 % of the values that are largest, divided by Σ|v|; 0 where all are 0."""
    sizes = np.sort(np.abs(values))[::-1]
    total = sizes.sum()
    return float(sizes[: int(np.ceil(TOP * len(sizes)))].sum() / total) if total > 0 else 0.0


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
