"""What a loss can be told: names and records, free of torch, so that a command line can read them in no time."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

Method = Literal["importance_sampling", "reinforce", "ppo", "cispo"]
METHODS: tuple[str, ...] = get_args(Method)
KLEstimate = Literal["k1", "k2", "k3"]
KL_ESTIMATES: tuple[KLEstimate, ...] = ("k1", "k2", "k3")
Direction = Literal["reverse", "forward"]
ListTail = Literal["bucket", "renormalise", "drop"]  # made from a list alone, in both directions
Tail = Literal[ListTail, "sampled"]
DIRECTIONS: tuple[Direction, ...] = ("reverse", "forward")
TAILS: tuple[ListTail, ...] = get_args(ListTail)

ERROR = 2e-3  # what rounding the gradient by the logits to bfloat16 costs


def _check_truncate_ratio(truncate_ratio: float | None) -> None:
    if truncate_ratio is not None and not truncate_ratio > 0:
        raise ValueError(f"truncate_ratio is {truncate_ratio}; it must be > 0, or None")


class RatioBounds(NamedTuple):
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """Which surrogate, its clips, and the KL to a reference model. `clip_low = 1` means no lower clip."""

    method: Method = "importance_sampling"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    truncate_ratio: float | None = None
    ratio_bounds: RatioBounds | None = None
    ref_kl_coef: float = 0.0
    ref_kl: KLEstimate = "k3"
    ref_kl_ratio: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; use one of {', '.join(METHODS)}")
        self._check_clips()
        _check_truncate_ratio(self.truncate_ratio)
        if self.ratio_bounds is not None and not 0 <= self.ratio_bounds.low < self.ratio_bounds.high:
            raise ValueError(f"ratio_bounds is {tuple(self.ratio_bounds)}; need 0 <= low < high")
        if not 0 <= self.ref_kl_coef < float("inf"):
            raise ValueError(f"ref_kl_coef is {self.ref_kl_coef}; it must be >= 0 and finite")
        if self.ref_kl not in KL_ESTIMATES:
            raise ValueError(f"ref_kl is {self.ref_kl!r}; use one of {', '.join(KL_ESTIMATES)}")

    def _check_clips(self) -> None:
        low, high = self.clip_low, self.clip_high
        if not 0 <= low <= 1 or not (high >= 0 or (self.method == "cispo" and high > -1 and high >= -low)):
            raise ValueError(
                f"clip_low is {low}, clip_high is {high}; need 0 <= clip_low <= 1 and clip_high >= 0 (for cispo "
                f"clip_high > -1 and clip_high >= -clip_low)"
            )
        if self.method not in ("ppo", "cispo") and (low, high) != (Surrogate.clip_low, Surrogate.clip_high):
            raise ValueError(
                f"clip_low is {low} and clip_high is {high}, but method {self.method!r} clips nothing; they belong to "
                f'"ppo" and "cispo"'
            )
        if self.dual_clip is not None and (self.method != "ppo" or not self.dual_clip > 1):
            raise ValueError(
                f'dual_clip is {self.dual_clip} with method {self.method!r}; it belongs to "ppo" and must be > 1'
            )


@dataclasses.dataclass(frozen=True)
class SampledTail:
    """How the sampled tokens stand for what a list of likeliest tokens leaves out (`fastkl.loss.top_k_kl_loss`)."""

    tail_weight: float = 1.0
    truncate_ratio: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.tail_weight <= 1.0:
            raise ValueError(
                f"tail_weight is {self.tail_weight}; it must be in [0, 1] (1: without bias, 0: the bucket alone)"
            )
        _check_truncate_ratio(self.truncate_ratio)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """What is added to the cross-entropy of a token (`fastkl.loss.linear_cross_entropy`)."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1]")
        if not 0.0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss is {self.z_loss}; it must be >= 0 and finite, the factor of lse²")


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A sparse backward pass: gradients from a random subset of the vocabulary, without bias.

    seed       int in 0 … 2⁶³ − 1. The same seed draws the same columns. Pass another one in each call, for example the
               number of the micro-batch: with one seed for all, the errors of successive steps would not average out.
    error      > 0, the expected relative error of the gradient by the logits, in each block of rows.
    threshold  > 0, τ itself instead of the error it is solved from. An id is used for certain where the root of the sum
               of its squared gradients over a block's rows is at least this, in the units of the loss before any mean.

    Raises ValueError for values that do not fit, and where both an error and a threshold are given.
    """

    seed: int
    error: float = ERROR
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}; it must be an int of at least 0, below 2**63")
        if self.threshold is not None and self.error != ERROR:
            raise ValueError(
                f"error is {self.error!r} and threshold is {self.threshold!r}; give one of them, for the threshold is "
                f"solved from the error"
            )
        for name, number in (("error", self.error), ("threshold", self.threshold)):
            if number is not None and not 0 < number < float("inf"):
                raise ValueError(f'{name} is {number!r}; it must be > 0 and finite (backward="exact" has no error)')


Backward = Literal["exact"] | Sparse


def _is_whole(number: Any) -> bool:
    """Whether it is an int; one of torch.compile's is."""
    if isinstance(number, int):
        return not isinstance(number, bool)
    from torch import SymInt

    return isinstance(number, SymInt)
