"""Means of graded answers and how sure they are, and what several answers to one problem come to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: Sequence[float], problems: Sequence[Hashable]) -> float | None:
    """Of the mean of values of which those of one problem depend on each other; None where all are of one problem.

    √(C / (C − 1) · Σ_c (Σ_{i in c} (v_i − mean))²) / N for N values of C problems: the clustered standard error of Miller,
    "Adding Error Bars to Evals" (2024), with the usual factor for few clusters. With one value of each problem it is that
    of independent values.
    """
    middle, sums = mean(values), defaultdict[Hashable, float](float)
    for value, problem in zip(values, problems, strict=True):
        sums[problem] += value - middle
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(total**2 for total in sums.values())) / len(values)


def best_of(scores: Sequence[float], k: int) -> float:
    """The expected best of k of the n scores, drawn without putting back: Σ_i s_(i) · C(i − 1, k − 1) / C(n, k), sorted.

    Its own expectation is that of the best of k answers. Of scores 0 and 1, c of them 1, it is 1 − C(n − c, k) / C(n, k):
    the unbiased pass@k of Chen et al., "Evaluating Large Language Models Trained on Code" (2021), equation 1.
    """
    all_draws = math.comb(len(scores), k)
    return sum(score * (math.comb(place, k - 1) / all_draws) for place, score in enumerate(sorted(scores)))


def powers_below(count: int) -> list[int]:
    """2, 4, 8 … below a number, and the number itself; nothing for 1."""
    powers = [2**power for power in range(1, count.bit_length()) if 2**power < count]
    return [*powers, count] if count > 1 else []
