"""Divergences between the next-token distributions of a student p and a teacher q, over the whole vocabulary.

With m a mixture of the two, each is a sum over the vocabulary, 0 · log 0 = 0:

    kind                   φ, value = Σ φ                            s                          u for s
    reverse_kl             p log(p/q)                                log(p/q)
    forward_kl             q log(q/p)                                1 − q/p                    p − q
    jsd                    β q log(q/m) + (1−β) p log(p/m)           (1−β) log(p/m)
    skewed_forward_kl      q log(q/m)                                (1−α) (1 − q/m)
    skewed_reverse_kl      p log(p/m)                                log(p/m) + α (1 − p/m)
    total_variation        ½ |p − q|                                 ½ sign(p − q)
    density_power          p (pᵅ − qᵅ)/α − (p¹⁺ᵅ − q¹⁺ᵅ)/(1+α)       (pᵅ − qᵅ)/α

    m = βq + (1−β)p        m = αq + (1−α)p        m = αp + (1−α)q        of jsd, skewed_forward_kl, skewed_reverse_kl

`parameter` is β of jsd, 0 < β < 1, or α of a skewed KL, 0 ≤ α < 1, whose value is at most −log α, or the power α of
density_power, α > 0, whose value is at most 1/α; the others have none and do not look at it. The jsd is at most the entropy
of (β, 1−β), the total variation at most 1.

The gradient by the logits z of the student: with g = ∂φ/∂p and ∂p_j/∂z_i = p_j (1[i = j] − p_i) it is

    u = p g − p Σ p g = p (s − Σ p s)

where s is g but for a constant, which falls out: it is chosen so that s = 0 where p = q.

At the edges: p = 0 and q = 0 are taken as limits, whether a logit is −inf or its exponential underflows, and logits of any
size are welcome. reverse_kl is +inf, and its gradient not finite, where the teacher forbids (a logit of −inf) what the
student may emit (p > 0); forward_kl is +inf where the student forbids what the teacher may emit (q > 0), and its gradient
p − q all the same. The other kinds are always finite. A row whose student or teacher is no distribution (a logit NaN or
+inf, or all −inf) is NaN. Equal logits give a value of 0 and a gradient of 0, exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:  # the command line reads the names, and waits for no torch
    from torch import Tensor

Divergence = Literal[
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
    "density_power",
]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
MOST_POWER = 1000.0  # 0.9 to this power is 0 in float32
LEAST_POWER = 1e-30  # below it a density power divergence is the reverse KL to every digit


class PerToken(NamedTuple):
    """By-products of a divergence, one entry per token, float32 (float64 for float64), detached, 0 where masked."""

    student_logprobs: Tensor | None  # log p of `tokens`; None where no tokens were given, as the next one
    teacher_logprobs: Tensor | None  # log q of `tokens`
    student_entropy: Tensor  # −Σ p log p, nats
    teacher_entropy: Tensor  # −Σ q log q
    reverse_kl: Tensor  # KL(p ‖ q)
    forward_kl: Tensor  # KL(q ‖ p)
    top1_agreement: Tensor  # 1 where the first maximum of p is that of q, else 0


BY_PRODUCTS = PerToken._fields[1:]  # the student's log-probs are there in any case
ROWS = 2
ROWS_WITH_EXTRAS = ROWS + len(BY_PRODUCTS)


class Outputs(NamedTuple):
    """The rows of `out` by name, [n] each."""

    value: Tensor  # the divergence, whose gradient is wanted
    token_nll: Tensor  # −log p[y], 0 without tokens
    by_products: dict[str, Tensor]  # those of `BY_PRODUCTS`, the teacher's log-probs 0 without tokens; or none
    hard_nll: Tensor | None  # the loss of a `HardTarget`, or none

    @classmethod
    def of(cls, out: Tensor) -> Outputs:
        """Views of `out`, [ROWS, n] or, with by-products, [ROWS_WITH_EXTRAS, n]; with a hard target one row more."""
        value, token_nll, *rest = out
        extras, hard = divmod(len(rest), len(BY_PRODUCTS))
        by_products = dict(zip(BY_PRODUCTS, rest, strict=False)) if extras else {}
        return cls(value, token_nll, by_products, rest[-1] if hard else None)


class HardTarget(NamedTuple):
    """Beside the divergence, coef · (−log p¹[y]) with p¹ = softmax(power · z): where z was divided by a temperature, p¹ is
    the distribution without it, softmax(z · temperature). The gradient by z is coef · power · (p¹ − 1[y]).
    """

    coef: float
    power: float


class Mixture(NamedTuple):
    """m = student · p + teacher · q."""

    student: float
    teacher: float


def check_beta(beta: float) -> None:
    """ValueError for what is no β of a jsd."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it must be in [0, 1] (0: forward KL, 1: reverse KL)")


def check_alpha(alpha: float) -> None:
    """ValueError for what is no α of a skewed KL."""
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha is {alpha}; it must be in [0, 1): at 1 both sides of the divergence are the same")


def check_power(power: float) -> None:
    """ValueError for what is no power of a density power divergence, nor of a bounded reward."""
    if not 0.0 <= power <= MOST_POWER:
        raise ValueError(
            f"power is {power}; it must be in [0, {MOST_POWER:g}] (0: the reverse KL; large powers see only certain tokens)"
        )


def mixture(kind: Divergence, parameter: float) -> Mixture:
    """The weights of m; of no meaning for kinds without one."""
    if kind == "skewed_reverse_kl":
        return Mixture(parameter, 1.0 - parameter)
    return Mixture(1.0 - parameter, parameter)


def effective_kind(kind: Divergence, parameter: float) -> Divergence:
    """At the ends of its parameter a kind is a plain KL, the jsd by convention, and defined on more; else the kind."""
    if kind == "density_power" and parameter < LEAST_POWER:
        return "reverse_kl"
    return _ENDS.get((kind, parameter), kind)


_ENDS: dict[tuple[Divergence, float], Divergence] = {
    ("jsd", 0.0): "forward_kl",
    ("jsd", 1.0): "reverse_kl",
    ("skewed_forward_kl", 0.0): "forward_kl",
    ("skewed_reverse_kl", 0.0): "reverse_kl",
}
