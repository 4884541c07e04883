"""The cross-entropy of `fastkl.integrations.liger`, beside its definition and, in Triton's interpreter, beside Liger's."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import INTERPRETED
from torch import Tensor

from fastkl import reference
from fastkl.integrations.liger import CrossEntropyOutput, LigerFusedLinearCrossEntropyLoss

N, D, V = 9, 8, 37
SPACE: dict[str, tuple[Any, ...]] = {
    "ce_weight": (False, True),
    "ignore_index": (-100, 3),
    "lse_square_scale": (0.0, 0.01),
    "label_smoothing": (0.0, 0.1),
    "reduction": ("mean", "sum", "none"),
    "softcap": (None, 3.0),
    "return_z_loss": (False, True),
    "accum_dtype": (None, torch.float32),
    "use_token_scaling": (False, True),
    "return_token_accuracy": (False, True),
    "return_predicted_tokens": (False, True),
    "bias": (True, False),
    "ignored": ("some", "all", "none"),
}
FIELDS = ("z_loss", "token_accuracy", "predicted_tokens")


def drawn(count: int, seed: int = 0, **fixed: Any) -> list[dict[str, Any]]:
    every = itertools.product(*[(fixed[name],) if name in fixed else values for name, values in SPACE.items()])
    return [dict(zip(SPACE, values, strict=True)) for values in random.Random(seed).sample(list(every), count)]


class Tensors:
    def __init__(self, chosen: dict[str, Any], dtype: torch.dtype = torch.float32):
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
        self.weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
        self.bias = torch.randn(V, generator=g).to(dtype).requires_grad_() if chosen["bias"] else None
        self.target = torch.randint(4, V, (N,), generator=g)
        self.target[:2] = reference.logits(self.hidden, self.weight, self.bias).argmax(-1)[:2]
        ignored = {"some": slice(4, 7), "all": slice(None), "none": slice(0)}[chosen["ignored"]]
        self.target[ignored] = chosen["ignore_index"]
        self.class_weight = torch.rand(V, generator=g) + 0.5

    @property
    def trained(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def call(self, kind: Any, chosen: dict[str, Any]) -> Any:
        options = {name: value for name, value in chosen.items() if name not in ("bias", "ignored")}
        options["ce_weight"] = self.class_weight if chosen["ce_weight"] else None
        return kind(**options)(self.weight, self.hidden, self.target, self.bias)


def definition(tensors: Tensors, chosen: dict[str, Any]) -> CrossEntropyOutput:
    """In float64, from all logits at once."""
    heads = [None if t is None else t.double() for t in (tensors.hidden, tensors.weight, tensors.bias)]
    z = reference.logits(*heads, softcap=chosen["softcap"])  # type: ignore[arg-type]
    target, ignored = tensors.target, chosen["ignore_index"]
    valid = target != ignored
    class_weight = tensors.class_weight.double() if chosen["ce_weight"] else torch.ones(V, dtype=torch.float64)
    smoothing = chosen["label_smoothing"]
    losses = F.cross_entropy(z, target, class_weight, ignore_index=ignored, label_smoothing=smoothing, reduction="none")
    squares = chosen["lse_square_scale"] * z.logsumexp(-1).square().where(valid, 0.0)
    right = ((z.argmax(-1) == target) & valid).double()
    ids = z.argmax(-1).where(valid, -1)
    if chosen["use_token_scaling"]:
        p = z.detach().softmax(-1).gather(-1, target.where(valid, 0)[:, None])[:, 0]
        losses, squares = losses * p, squares * p
    if chosen["reduction"] == "none":
        return CrossEntropyOutput(losses + squares, squares, right, ids)
    count = valid.sum().clamp(min=1)
    accuracy = right.sum() / count
    losses, squares = losses.sum(), squares.sum()
    if chosen["reduction"] == "mean":
        losses = losses / class_weight[target.where(valid, 0)].where(valid, 0.0).sum().clamp(min=1e-9)
        squares = squares / count
    return CrossEntropyOutput(losses + squares, squares, accuracy, ids)


def compare(tensors: Tensors, found: Any, expected: Any, chosen: dict[str, Any], near: float) -> None:
    """Results, and the gradients under an upstream gradient that differs from token to token."""
    wanted = [field for field in FIELDS if chosen[f"return_{field}"]]
    assert isinstance(found, CrossEntropyOutput if wanted else Tensor)
    values = [result if isinstance(result, Tensor) else result.loss for result in (found, expected)]
    torch.testing.assert_close(values[0].double(), values[1].double(), rtol=near, atol=near, msg=str(chosen))
    gradients = []
    for value in values:
        above = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
        gradients.append(torch.autograd.grad((value * above).sum(), tensors.trained))
    torch.testing.assert_close(*gradients, rtol=near, atol=near, msg=str(chosen))
    for field in FIELDS if wanted else ():
        ours, theirs = getattr(found, field), getattr(expected, field)
        if field not in wanted:
            assert ours is None
        else:
            torch.testing.assert_close(
                ours, theirs.detach().to(ours.dtype), rtol=near, atol=near, msg=f"{field} {chosen}"
            )


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)], ids=["few", "many"])
def test_it_is_what_it_is_defined_as(count: int) -> None:
    for chosen in drawn(count):
        tensors = Tensors(chosen)
        found = tensors.call(LigerFusedLinearCrossEntropyLoss, chosen)
        compare(tensors, found, definition(tensors, chosen), chosen, near=1e-5)


@pytest.mark.skipif(
    not INTERPRETED, reason="Liger's kernel runs on a GPU or in the interpreter; test_interpreted.py does that"
)
@pytest.mark.parametrize("seed", range(10))
def test_it_is_what_liger_gives(seed: int) -> None:
    """But for class weights and soft-caps, for which Liger's kernel does not run in the interpreter."""
    liger = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy")
    for chosen in drawn(15, seed, ce_weight=False, softcap=None):
        if chosen["ignored"] == "all" and (chosen["return_token_accuracy"] or chosen["reduction"] == "mean"):
            continue  # 0 / 0 there
        tensors = Tensors(chosen)
        ours, theirs = LigerFusedLinearCrossEntropyLoss, liger.LigerFusedLinearCrossEntropyLoss
        compare(tensors, tensors.call(ours, chosen), tensors.call(theirs, chosen), chosen, near=1e-4)


def test_probabilities_that_underflow_have_a_prediction() -> None:
    chosen = {name: values[0] for name, values in SPACE.items()}
    chosen |= {"use_token_scaling": True, "return_predicted_tokens": True}
    tensors = Tensors(chosen)
    with torch.no_grad():
        tensors.hidden[0] = 200.0
        tensors.target[0] = reference.logits(tensors.hidden, tensors.weight, tensors.bias)[0].argmin()
    found = tensors.call(LigerFusedLinearCrossEntropyLoss, chosen)
    torch.testing.assert_close(found.predicted_tokens, definition(tensors, chosen).predicted_tokens)
    assert found.loss.isfinite()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reduction": "batchmean"}, "reduction is 'batchmean'; use one of mean, sum, none"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must be in"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be > 0, or None"),
        (
            {"accum_dtype": torch.float64},
            r"accum_dtype is torch\.float64; gradients of torch\.float32 are summed in float32",
        ),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    tensors = Tensors({name: values[0] for name, values in SPACE.items()})
    with pytest.raises(ValueError, match=said):
        LigerFusedLinearCrossEntropyLoss(**options)(tensors.weight, tensors.hidden, tensors.target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": torch.zeros(N + 1).long()}, r"target is \[10\] but _input is \[9, 8\]: expected .* \[9\]"),
        ({"target": torch.full((N,), V)}, "targets holds the id 37, outside the vocabulary"),
        ({"class_weight": torch.ones(5)}, r"ce_weight is \[5\]; expected a weight for each id of lin_weight, \[37\]"),
    ],
)
def test_calls_that_do_not_fit(change: dict[str, Tensor], said: str) -> None:
    chosen = {name: values[0] for name, values in SPACE.items()} | {"ce_weight": True}
    tensors = Tensors(chosen)
    vars(tensors).update(change)
    with pytest.raises(ValueError, match=said):
        tensors.call(LigerFusedLinearCrossEntropyLoss, chosen)


def test_class_weights_of_low_precision_are_summed_in_float32() -> None:
    chosen = {name: values[0] for name, values in SPACE.items()} | {"ce_weight": True}
    tensors = Tensors(chosen)
    tensors.class_weight = tensors.class_weight.bfloat16()
    found = tensors.call(LigerFusedLinearCrossEntropyLoss, chosen)
    compare(tensors, found, definition(tensors, chosen), chosen, near=1e-5)
