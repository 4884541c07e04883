"""The loss of a distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkl.kernels.divergence.formula import Divergence, check_alpha, check_beta, check_power
from fastkl.kernels.options import Backward, Direction, Method, RatioBounds, SampledTail, Sparse, Surrogate, Tail
from fastkl.trainer.config.losses.control import Control
from fastkl.trainer.config.losses.weights import FUNCTION, weight_rule
from fastkl.trainer.config.rules import at_least, fraction, named, positive, unchanged
from fastkl.trainer.errors import require

ObjectiveName = Literal["policy_gradient", "top_k", Divergence]
ListedBy = Literal["teacher", "student", "both"]
SERVED: tuple[ObjectiveName, ...] = ("policy_gradient", "top_k")  # they take a teacher that a server holds
SURROGATE = ("method", "clip_low", "clip_high", "dual_clip", "truncate_ratio", "ratio_bounds")
# What becomes of the teacher's scores in an advantage.
KL_PART = ("discount", "baseline", "advantage_power", "advantage_clip", "extrapolate")
ADVANTAGE = ("kl_coef", "redistribute", "redistribute_clip", *KL_PART)
# The objectives that an option belongs to. The others refuse another value than its default.
OPTION_OF: dict[str, tuple[ObjectiveName, ...]] = {
    **dict.fromkeys((*SURROGATE, *ADVANTAGE, "ratio", "old_logprobs", "max_segment"), ("policy_gradient",)),
    "truncate_ratio": ("policy_gradient", "top_k"),
    "jsd_beta": ("jsd",),
    "skew_alpha": ("skewed_reverse_kl", "skewed_forward_kl"),
    "divergence_power": ("density_power",),
    "forward_kl_top_k": ("policy_gradient",),
    **dict.fromkeys(("top_k", "top_k_of", "top_k_direction", "top_k_tail", "tail_weight"), ("top_k",)),
}
# The objectives that are the forward KL where a setting has a value.
FORWARD_KL: dict[ObjectiveName, tuple[str, str | float]] = {
    "forward_kl": ("objective", "forward_kl"),
    "jsd": ("jsd_beta", 0),
    "skewed_forward_kl": ("skew_alpha", 0),
    "top_k": ("top_k_direction", "forward"),
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
        baseline: Subtract from the KL of a token its mean over the step's other completions (mean), or the exact KL at its
            place (kl), which needs the teacher's model here. Neither changes the gradient's mean. none: subtract nothing.
        advantage_power: Bound the KL's part of an advantage by this power a of the probabilities: it is (q^a − p^a) / a in
            place of log q − log p. 0: no bound.
        advantage_clip: Clip the KL's part of an advantage to plus and minus this. null: no clip.
        extrapolate: Go past the teacher by this factor, away from the model in `reference`. 1: go to the teacher.
        redistribute: Let the teacher weigh the reward at each token: this share of its advantage is multiplied by the
            teacher's probability over the student's, or by the inverse where the advantage is negative. 0: every token of
            a sample has the same.
        redistribute_clip: Clip that ratio to 1 ± this.
        max_segment: Of a teacher with its own tokenizer, leave out the score of a stretch of more bytes than this, within
            which no tokens of student and teacher end at the same place.
        old_logprobs: Take the importance ratio against the log-probs of the sampler (sampler), or against those of a
            forward pass before the update (recompute). current: the ratio is 1.
        clip_low: Clip the ratio of ppo and cispo at 1 − clip_low.
        clip_high: Clip the ratio of ppo and cispo at 1 + clip_high.
        dual_clip: Limit the loss of ppo where the advantage is negative, to this times its size. null: no limit.
        truncate_ratio: Cap the importance ratio at this, also that of top_k_tail: sampled. null: no cap.
        ratio: Take the importance ratio of each token (token), or the geometric mean over its completion (sequence).
        ratio_bounds: Leave out of the loss what has a ratio outside [low, high]: tokens, or whole completions with ratio:
            sequence. 0 and .inf leave a side open. null: nothing is left out.
        backward: Compute all of the gradient (exact), or estimate it from a random subset of the vocabulary, without bias
            (sparse; docs/losses/sparse-backward.md).
        sparse_error: Allow the sparse gradient this relative error. null: the loss's default, 0.002.
        jsd_beta: Set β of jsd. 0 is the forward KL, 1 the reverse KL.
        skew_alpha: Mix this share of the one distribution into the other, for skewed_reverse_kl and skewed_forward_kl.
        divergence_power: Set α of density_power. 0 is the reverse KL, 1 is ½ Σ (p − q)². The larger, the less unlikely
            tokens count.
        top_k: Compare this many of the likeliest tokens. A vLLM server has a limit, 20 by default.
        top_k_of: Choose whose likeliest tokens top_k compares: those of the teacher, of the student, or of both, each with
            top_k. The student lists them in one more forward pass before the update. A server must then score given ids
            (docs/teachers/servers.md).
        top_k_direction: Choose the reverse or the forward KL of top_k.
        top_k_tail: Treat all other tokens as one outcome (bucket), or leave them out with a renormalisation (renormalise)
            or without (drop). Those two are far from the reverse KL: for two flat students their gradients were off by
            42 to 112 % of its gradient's length at 20 tokens, by 110 to 213 % at one (docs/objectives/objectives.md).
            sampled: as bucket, and the sampled token stands for what the bucket does not see. On average that is the
            reverse KL over the whole vocabulary.
        tail_weight: Weigh the sampled token of top_k_tail by this. Below 1 there is less noise, and a part of the bucket's
            bias. 0: the bucket alone.
        forward_kl_above: Add the forward KL where the teacher's entropy is above this many nats (EOPD;
            docs/objectives/token-weights.md). null: add none.
        forward_kl_coef: Weigh the added forward KL by this.
        forward_kl_top_k: Ask the teacher for this many of its likeliest tokens for it, under policy_gradient.
        weights: Weigh each token by the product of these rules: skip_first:N, top_gap:SHARE, tip:SHARE, drift:GAMMA,
            function:MODULE.NAME (docs/objectives/token-weights.md). The loss is the weighted mean. Empty: every token
            counts 1.
        trust_weights: Allow the Python function that `weights` names to be imported and run.
        control: Run a control, which shows whether the teacher mattered (docs/objectives/token-weights.md). shuffled:
            judge each token by the teacher's score of another sample. no_teacher: put a fixed penalty in the teacher's
            place.
        control_penalty: Set the reverse KL of no_teacher, in nats, at the unlikeliest tokens. It is 0 at all others.
        control_share: Penalise this share of a step's tokens, those with the lowest log-probs.
    """

    objective: ObjectiveName = "policy_gradient"
    method: Method = Surrogate.method
    kl_coef: float = 1.0
    discount: float = 0.0
    baseline: Literal["none", "mean", "kl"] = "none"
    advantage_power: float = 0.0
    advantage_clip: float | None = None
    extrapolate: float = 1.0
    redistribute: float = 0.0
    redistribute_clip: float = 0.2
    max_segment: int = 64
    old_logprobs: Literal["sampler", "recompute", "current"] = "sampler"
    clip_low: float = Surrogate.clip_low
    clip_high: float = Surrogate.clip_high
    dual_clip: float | None = Surrogate.dual_clip
    truncate_ratio: float | None = Surrogate.truncate_ratio
    ratio: Literal["token", "sequence"] = "token"
    ratio_bounds: list[float] | None = None
    backward: Literal["exact", "sparse"] = "exact"
    sparse_error: float | None = None
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    divergence_power: float = 1.0
    top_k: int = 20
    top_k_of: ListedBy = "teacher"
    top_k_direction: Direction = "reverse"
    top_k_tail: Tail = "bucket"
    tail_weight: float = SampledTail.tail_weight
    forward_kl_above: float | None = None
    forward_kl_coef: float = 1.0
    forward_kl_top_k: int = 16
    weights: list[str] = field(default_factory=list)
    trust_weights: bool = False
    control: Control | None = None
    control_penalty: float = 0.5
    control_share: float = 0.2

    def __post_init__(self) -> None:
        for name, objectives in OPTION_OF.items():
            if self.objective not in objectives:
                reason = (
                    f"loss.objective is {self.objective}: it belongs to {' and '.join(objectives)}; unset one of them"
                )
                unchanged(self, "loss.", reason, [name])
        if self.backward == "exact":
            unchanged(self, "loss.", "loss.backward is exact; set loss.backward to sparse", ["sparse_error"])
        require(
            self.ratio_bounds is None or len(self.ratio_bounds) == 2,
            f"loss.ratio_bounds is {self.ratio_bounds}; give two numbers, [low, high], where 0 and .inf leave a side open",
        )
        with named({name: f"loss.{name}" for name in SURROGATE}):
            self.surrogate()
        with named({"error": "loss.sparse_error"}):
            self.backward_pass(seed=0)
        at_least(0, self, "loss.", "kl_coef")
        at_least(1, self, "loss.", "max_segment")
        with named({"beta": "loss.jsd_beta", "alpha": "loss.skew_alpha", "power": "loss.divergence_power"}):
            check_beta(self.jsd_beta)
            check_alpha(self.skew_alpha)
            check_power(self.divergence_power)
        fraction(self, "loss.", "discount", "redistribute")
        require(
            0 <= self.redistribute_clip < 1,
            f"loss.redistribute_clip is {self.redistribute_clip}; it must be at least 0 and below 1",
        )
        if self.redistribute == 0:
            unchanged(self, "loss.", "loss.redistribute is 0; set it", ["redistribute_clip"])
        self._check_kl_part()
        at_least(1, self, "loss.", "top_k")
        self._check_tail()
        self._check_forward_kl()
        self._check_control()
        rules = [weight_rule(text) for text in self.weights]
        require(
            not self.trust_weights or any(rule.name == FUNCTION for rule in rules),
            f"loss.trust_weights is true, but loss.weights is {self.weights}, which names no function of yours; unset it",
        )
        clips = self.method in ("ppo", "cispo") or self.truncate_ratio is not None
        require(
            not clips or self.old_logprobs != "current",
            f"loss.method is {self.method} and loss.truncate_ratio is {self.truncate_ratio}, but loss.old_logprobs is "
            f"current: the ratio is 1, and nothing is clipped; set loss.old_logprobs to sampler or recompute",
        )
        if self.old_logprobs == "current":
            reason = "loss.old_logprobs is current: every ratio is 1; set it to sampler or recompute"
            unchanged(self, "loss.", reason, ["ratio", "ratio_bounds"])
        if self.method == "reinforce" and self.ratio_bounds is None and self.truncate_ratio is None:
            reason = (
                "loss.method is reinforce, which has no ratio without loss.ratio_bounds or loss.truncate_ratio; set one of "
                "them, or unset this"
            )
            unchanged(self, "loss.", reason, ["ratio"])

    def _check_kl_part(self) -> None:
        with named({"power": "loss.advantage_power"}):
            check_power(self.advantage_power)
        positive(self, "loss.", "advantage_clip", "extrapolate")
        if self.kl_coef == 0:
            reason = "loss.kl_coef is 0, which leaves the KL out of the advantages; unset it, or raise loss.kl_coef"
            unchanged(self, "loss.", reason, KL_PART)
        if self.advantage_power > 0:
            reason = f"loss.advantage_power is {self.advantage_power}"
            unchanged(
                self, "loss.", f"{reason}: what it bounds are probabilities of the teacher; unset one", ["extrapolate"]
            )
            require(
                self.baseline != "kl",
                f"loss.baseline is kl, but {reason}: the KL is not the mean of what it bounds; set loss.baseline to mean",
            )

    def _check_tail(self) -> None:
        if self.objective != "top_k":
            return
        if self.top_k_tail != "sampled":
            reason = f"loss.top_k_tail is {self.top_k_tail}: it belongs to sampled; unset one of them"
            unchanged(self, "loss.", reason, ["tail_weight", "truncate_ratio"])
        require(
            self.top_k_tail != "sampled" or self.top_k_direction == "reverse",
            f"loss.top_k_tail is sampled and loss.top_k_direction is {self.top_k_direction}: the student's tokens stand "
            f"for the tail of the reverse KL alone; set loss.top_k_direction to reverse, or loss.top_k_tail to bucket",
        )
        require(
            self.top_k_tail != "sampled" or self.control is None,
            f"loss.control is {self.control} and loss.top_k_tail is sampled: a list of another place does not say what the "
            f"token here stands for; set loss.top_k_tail to bucket",
        )
        with named({"tail_weight": "loss.tail_weight"}):
            SampledTail(self.tail_weight)
        if self.tail_weight == 0:
            unchanged(
                self, "loss.", "loss.tail_weight is 0: no token has a ratio; unset one of them", ["truncate_ratio"]
            )

    def _check_forward_kl(self) -> None:
        at_least(0, self, "loss.", "forward_kl_above")
        positive(self, "loss.", "forward_kl_coef")
        at_least(1, self, "loss.", "forward_kl_top_k")
        above = self.forward_kl_above
        if above is None:
            reason = "loss.forward_kl_above is null, which adds no forward KL; set it, or unset this"
            unchanged(self, "loss.", reason, ["forward_kl_coef", "forward_kl_top_k"])
            return
        setting, value = FORWARD_KL.get(self.objective, ("objective", None))
        beside = "" if setting == "objective" else f", loss.{setting} {value}"
        require(
            getattr(self, setting) != value,
            f"loss.forward_kl_above is {above:g}, but loss.objective is {self.objective}{beside}: it is the forward KL "
            f"already; unset one of them",
        )
        require(
            self.control is None,
            f"loss.forward_kl_above is {above:g}, but loss.control is {self.control}: it would compare with the teacher; "
            f"unset one of them",
        )

    def _check_control(self) -> None:
        positive(self, "loss.", "control_penalty", "control_share")
        fraction(self, "loss.", "control_share")
        if self.control != "no_teacher":
            reason = f"loss.control is {self.control or 'null'}; set it to no_teacher, or unset this"
            unchanged(self, "loss.", reason, ["control_penalty", "control_share"])
        if self.control is None:
            return
        able = SERVED if self.control == "shuffled" else SERVED[:1]
        require(
            self.objective in able,
            f"loss.control is {self.control}, but loss.objective is {self.objective}; it needs {' or '.join(able)}",
        )
        require(
            self.kl_coef > 0 or self.redistribute > 0,
            f"loss.control is {self.control}, but loss.kl_coef and loss.redistribute are 0: no teacher takes part anyway; "
            f"unset it, or raise one of them",
        )
        if self.control == "no_teacher":
            reason = "loss.control is no_teacher, and this would bring the teacher's own scores in; unset one of them"
            unchanged(self, "loss.", reason, ["extrapolate"])
            require(self.baseline != "kl", f"loss.baseline is kl, but {reason}")
        seen = [text for text in self.weights if not weight_rule(text).is_blind]
        require(
            not seen,
            f"loss.control is {self.control}, but loss.weights has {' and '.join(seen)}, which would see the teacher's own "
            f"scores; unset one of them",
        )

    def surrogate(self) -> Surrogate:
        """The options of policy_gradient, as the loss takes them."""
        options = {name: getattr(self, name) for name in SURROGATE}
        bounds = None if self.ratio_bounds is None else RatioBounds(*self.ratio_bounds)
        return Surrogate(**{**options, "ratio_bounds": bounds})

    def backward_pass(self, seed: int) -> Backward:
        """`backward`, as the losses take it."""
        if self.backward == "exact":
            return "exact"
        return Sparse(seed) if self.sparse_error is None else Sparse(seed, self.sparse_error)
