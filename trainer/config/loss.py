"""The loss of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastkl.kernels.divergence.formula import Divergence, check_alpha, check_beta
from fastkl.kernels.options import Backward, Direction, ListTail, Method, Sparse, Surrogate
from fastkl.trainer.config.rules import at_least, fraction, named, unchanged
from fastkl.trainer.errors import require

ObjectiveName = Literal["policy_gradient", "top_k", Divergence]
SERVED: tuple[ObjectiveName, ...] = ("policy_gradient", "top_k")  # they take a teacher that a server holds
SURROGATE = ("method", "clip_low", "clip_high", "dual_clip", "truncate_ratio")
# The objectives that an option belongs to. The others refuse another value than its default.
OPTION_OF: dict[str, tuple[ObjectiveName, ...]] = {
    **dict.fromkeys((*SURROGATE, "kl_coef", "discount", "old_logprobs"), ("policy_gradient",)),
    "jsd_beta": ("jsd",),
    "skew_alpha": ("skewed_reverse_kl", "skewed_forward_kl"),
    **dict.fromkeys(("top_k", "top_k_direction", "top_k_tail"), ("top_k",)),
}


@dataclass(frozen=True)
class LossConfig:
    """What the student minimises on its own samples: a mean over their tokens (`fastkl.loss`).

    Args:
        objective: Choose the loss. policy_gradient: a policy-gradient step on the reverse KL at the sampled tokens. top_k:
            the KL divergence to the teacher's k likeliest tokens. Any other: that divergence over the whole vocabulary, at
            every token; it needs the teacher's model here.
        method: Choose the formula of policy_gradient: importance_sampling, reinforce, ppo or cispo.
        kl_coef: Weigh the reverse KL in the advantage by this. 0, with a reward, is plain reinforcement learning.
        discount: Discount the KL of later tokens by this. 0: each token answers for itself alone.
        old_logprobs: Take the importance ratio against the log-probs of the sampler (sampler), or against those of a
            forward pass before the update (recompute). current: the ratio is 1.
        clip_low: Clip the ratio of ppo and cispo at 1 − clip_low.
        clip_high: Clip the ratio of ppo and cispo at 1 + clip_high.
        dual_clip: Limit the loss of ppo where the advantage is negative, to this times its size. null: no limit.
        truncate_ratio: Cap the importance ratio at this. null: no cap.
        backward: Compute all of the gradient (exact), or estimate it from a random subset of the vocabulary, without bias
            (sparse; docs/understand/sparse-backward.md).
        sparse_error: Allow the sparse gradient this relative error. null: the loss's default, 0.002.
        jsd_beta: Set β of jsd. 0 is the forward KL, 1 the reverse KL.
        skew_alpha: Mix this share of the one distribution into the other, for skewed_reverse_kl and skewed_forward_kl.
        top_k: Compare this many of the teacher's likeliest tokens. A vLLM server has a limit, 20 by default.
        top_k_direction: Choose the reverse or the forward KL of top_k.
        top_k_tail: Treat all other tokens as one outcome (bucket), or leave them out with a renormalisation (renormalise)
            or without (drop).
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
    top_k_tail: ListTail = "bucket"

    def __post_init__(self) -> None:
        for name, objectives in OPTION_OF.items():
            if self.objective not in objectives:
                reason = (
                    f"loss.objective is {self.objective}: it belongs to {' and '.join(objectives)}; unset one of them"
                )
                unchanged(self, "loss.", reason, [name])
        if self.backward == "exact":
            unchanged(self, "loss.", "loss.backward is exact; set loss.backward to sparse", ["sparse_error"])
        with named({name: f"loss.{name}" for name in SURROGATE}):
            self.surrogate()
        with named({"error": "loss.sparse_error"}):
            self.backward_pass(seed=0)
        at_least(0, self, "loss.", "kl_coef")
        with named({"beta": "loss.jsd_beta", "alpha": "loss.skew_alpha"}):
            check_beta(self.jsd_beta)
            check_alpha(self.skew_alpha)
        fraction(self, "loss.", "discount")
        at_least(1, self, "loss.", "top_k")
        clips = self.method in ("ppo", "cispo") or self.truncate_ratio is not None
        require(
            not clips or self.old_logprobs != "current",
            f"loss.method is {self.method} and loss.truncate_ratio is {self.truncate_ratio}, but loss.old_logprobs is "
            f"current: the ratio is 1, and nothing is clipped; set loss.old_logprobs to sampler or recompute",
        )

    def surrogate(self) -> Surrogate:
        """The options of policy_gradient, as the loss takes them."""
        return Surrogate(**{name: getattr(self, name) for name in SURROGATE})

    def backward_pass(self, seed: int) -> Backward:
        """`backward`, as the losses take it."""
        if self.backward == "exact":
            return "exact"
        return Sparse(seed) if self.sparse_error is None else Sparse(seed, self.sparse_error)
