"""What the losses return, and the statistics in it."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastkl.kernels.divergence.formula import PerToken
from fastkl.kernels.top_k.sampled import TailPerToken


class Predictions(NamedTuple):
    """What a head says of each token, detached."""

    ids: Tensor  # [...] int64, the likeliest one, the first of several; −1 where masked
    lse: Tensor  # [...] float32 (float64 for float64), logsumexp(z), 0 where masked


class LossOutput(NamedTuple):
    """What every loss returns, whatever its options. Its `loss` is the tensor: `output.loss.backward()`."""

    # 0-dim, or one entry per token with reduction="none"; differentiable if hidden, weight or bias requires a gradient.
    loss: Tensor
    # Log-prob of each token, float32 (float64 for float64), detached, 0 where masked; None where no tokens were given.
    logprobs: Tensor | None
    metrics: dict[str, Tensor]  # detached 0-dim tensors; reading one synchronises
    # Of a divergence or a cross-entropy that was asked for it; of a top-k KL with a sampled tail in any case.
    per_token: PerToken | Predictions | TailPerToken | None = None


def _no_such_attribute(_: LossOutput, name: str) -> NoReturn:
    meant = f"; its loss is a tensor and has one: write output.loss.{name}" if hasattr(Tensor, name) else ""
    raise AttributeError(f"a LossOutput has no {name!r}{meant}")


def _no_arithmetic(*_: Any) -> NoReturn:
    raise TypeError("a LossOutput is no tensor, and its loss is one: write output.loss, as in output.loss / 2")


def _no_assignment(_: LossOutput, name: str, __: Any) -> NoReturn:
    raise AttributeError(
        f"a LossOutput cannot be changed: write output = output._replace({name}=…); where other code does it, as peft's "
        f"AdaLora in its forward, give it transformers' CausalLMOutput(loss=output.loss)"
    )


# Not in the class: to a type checker there are none. As a tuple it would join with another and repeat itself, where its
# loss was meant.
_OPERATORS = ("add", "sub", "mul", "truediv", "radd", "rsub", "rmul", "rtruediv", "neg", "float")
for _name, _function in {
    "getattr": _no_such_attribute,
    "setattr": _no_assignment,
    **dict.fromkeys(_OPERATORS, _no_arithmetic),
}.items():
    setattr(LossOutput, f"__{_name}__", _function)


def is_likeliest(gap: Tensor, lse: Tensor) -> Tensor:
    """bool: no token has a greater logit, nor is one NaN.

    `gap` is the largest logit less the token's own. A kernel's maximum does not see a NaN, lse does.
    """
    return (gap == 0) & ~lse.isnan()


def ratio_metrics(ratios: Tensor, active: Tensor) -> dict[str, Tensor]:
    """Of importance ratios [N] before any cap."""
    return {
        "ratio_mean": masked_mean(ratios, active),
        "ratio_min": masked_extreme(ratios, active, largest=False),
        "ratio_max": masked_extreme(ratios, active, largest=True),
    }


def sparse_metrics(statistics: Tensor | None) -> dict[str, Tensor]:
    """What a sparse backward pass says of itself (`ColumnSampler.statistics`)."""
    return {} if statistics is None else {"kept_fraction": statistics[0], "grad_error": statistics[1]}


def masked_mean(values: Tensor, active: Tensor) -> Tensor:
    """Mean over the active entries, 0 if there are none."""
    return values.where(active, 0.0).sum() / active.sum().clamp(min=1)


def masked_extreme(values: Tensor, active: Tensor, largest: bool) -> Tensor:
    """Largest or smallest active entry, 0 if there are none."""
    if values.numel() == 0:
        return values.new_zeros(())
    extreme = values.where(active, -torch.inf).amax() if largest else values.where(active, torch.inf).amin()
    return extreme.where(active.any(), 0.0)
