"""The loss of a distillation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from fastkl.kernels.divergence.formula import Divergence
from fastkl.kernels.surrogate import Method, Surrogate
from fastkl.kernels.top_k.formula import Direction, Tail
from fastkl.trainer.errors import require

ObjectiveName = Literal["policy_gradient", "top_k", Divergence]
SKEWED: tuple[ObjectiveName, ...] = ("skewed_reverse_kl", "skewed_forward_kl")
SURROGATE = tuple(field.name for field in fields(Surrogate))
# The objectives that an option belongs to; the others refuse another value than its default.
OPTION_OF: dict[str, tuple[ObjectiveName, ...]] = {
    **dict.fromkeys((*SURROGATE, "kl_coef", "discount", "old_logprobs"), ("policy_gradient",)),
    "jsd_beta": ("jsd",),
    "skew_alpha": SKEWED,
    **dict.fromkeys(("top_k", "top_k_direction", "top_k_tail"), ("top_k",)),
}


@dataclass(frozen=True)
class LossConfig:
    """What the student minimises on its own samples, a mean over their tokens (`fastkl.loss`).

    Args:
        objective: policy_gradient: a policy-gradient step on the reverse KL at the sampled tokens (policy_gradient_loss).
            top_k: the KL divergence to the teacher's k likeliest tokens (top_k_kl_loss). Any other: that divergence between
            the distributions over the whole vocabulary, at every token; the teacher must be a model here.
        method: importance_sampling, reinforce, ppo or cispo.
        kl_coef: Weight of the reverse KL in the advantage; 0, with a reward, is plain reinforcement learning.
        discount: Discount of future tokens' KL; 0 lets each token answer for itself.
        old_logprobs: What the ratio is taken against: the sampler's log-probs, those of a forward of the trainer before
            the update (recompute), or the policy itself (current: ratio 1).
        clip_low: Lower clip of ppo and cispo.
        clip_high: Upper clip of ppo and cispo.
        dual_clip: Dual clip of ppo; null for none.
        truncate_ratio: Cap of the importance ratio; null for none.
        backward: exact, or sparse: gradients from a random subset of the vocabulary's columns, unbiased
            (docs/sparse-backward.md).
        sparse_error: Expected relative error of the sparse gradient; null for the loss's own default.
        jsd_beta: β of jsd: 0 is the forward KL, 1 the reverse KL.
        skew_alpha: α of skewed_reverse_kl and skewed_forward_kl, the share of the one distribution that is mixed into the
            other.
        top_k: How many of the teacher's likeliest tokens top_k has. A server may limit it (vLLM: 20, max-logprobs).
        top_k_direction: reverse or forward KL.
        top_k_tail: What becomes of all other tokens: bucket (one outcome), renormalise or drop.
    """

    objective: ObjectiveName = "policy_gradient"
    method: Method = Surrogate.method
    kl_coef: float = 1.0
    discount: float = 0.0
    old_logprobs: Literal["sampler", "recompute", "current"] = "sampler"
    clip_low: float = Surrogate.clip_low
    clip_high: float = Surrogate.clip_high
    dual_clip: float | None = Surrogate.dual_clip
    truncate_ratio: float | None = Surrogate.truncate_ratio
    backward: Literal["exact", "sparse"] = "exact"
    sparse_error: float | None = None
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    top_k: int = 20
    top_k_direction: Direction = "reverse"
    top_k_tail: Tail = "bucket"

    def __post_init__(self) -> None:
        for name, objectives in OPTION_OF.items():
            value: Any = getattr(self, name)
            require(
                self.objective in objectives or value == getattr(LossConfig, name),
                f"loss.{name} is {value} but loss.objective is {self.objective}: it belongs to {' and '.join(objectives)}; "
                f"unset it, or change the objective",
            )
        require(0 <= self.jsd_beta <= 1, f"loss.jsd_beta is {self.jsd_beta}; it must be between 0 and 1")
        require(0 <= self.skew_alpha < 1, f"loss.skew_alpha is {self.skew_alpha}; it must be at least 0 and below 1")
        require(self.top_k >= 1, f"loss.top_k is {self.top_k}; it must be at least 1")
        require(
            self.sparse_error is None or self.sparse_error > 0,
            f"loss.sparse_error is {self.sparse_error}; it must be > 0, or null",
        )
        require(
            self.backward == "sparse" or self.sparse_error is None,
            f"loss.sparse_error is {self.sparse_error} but loss.backward is exact; set loss.backward to sparse",
        )
        require(
            self.truncate_ratio is None or self.old_logprobs != "current",
            f"loss.truncate_ratio is {self.truncate_ratio} but loss.old_logprobs is current, where the ratio is 1; "
            f"unset one of them",
        )
        require(
            self.truncate_ratio is None or self.truncate_ratio > 0,
            f"loss.truncate_ratio is {self.truncate_ratio}; it must be > 0, or null for no cap",
        )
        require(
            0 <= self.clip_low <= 1 and self.clip_high >= 0,
            f"loss.clip_low is {self.clip_low} and loss.clip_high is {self.clip_high}; clip_low must be between 0 and 1 "
            f"and clip_high >= 0",
        )
        require(
            self.dual_clip is None or (self.method == "ppo" and self.dual_clip > 1),
            f"loss.dual_clip is {self.dual_clip} with loss.method {self.method}; it must be > 1 and belongs to ppo",
        )
        require(
            self.method in ("ppo", "cispo") or (self.clip_low, self.clip_high) == (0.2, 0.2),
            f"loss.clip_low is {self.clip_low} and loss.clip_high is {self.clip_high}, but loss.method is {self.method}, "
            f"which clips nothing; they belong to ppo and cispo",
        )
        require(
            self.method not in ("ppo", "cispo") or self.old_logprobs != "current",
            f"loss.method is {self.method} but loss.old_logprobs is current, where the ratio is 1 and nothing is ever "
            f"clipped; use sampler or recompute",
        )
        require(
            self.kl_coef >= 0, f"loss.kl_coef is {self.kl_coef}; it must be >= 0: below, the student flees the teacher"
        )
        require(0 <= self.discount <= 1, f"loss.discount is {self.discount}; it must be between 0 and 1")
