"""Divergences from a teacher with another vocabulary: over the tokens that both have, and one outcome for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import DIVERGENCES, PARAMETERS
from property_settings import PROPERTY
from torch import Tensor

from fastkl import loss, reference
from fastkl.loss import common_vocabulary_logits

V, V_T, D, D_T, N = 13, 17, 5, 7, 6
KINDS: dict[str, dict[str, float]] = {
    name: {PARAMETERS[name]: {"beta": 0.3, "alpha": 0.1}[PARAMETERS[name]]} if name in PARAMETERS else {}
    for name in DIVERGENCES
    if name != "density_power"
}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"temperature": 0.7, "logit_scale": 1.6, "softcap": 2.5},
    "temperatures": {
        "temperature": 1.7,
        "teacher_temperature": 0.6,
        "teacher_logit_scale": 0.8,
        "teacher_softcap": 4.0,
    },
}
# How many tokens are common, and how many the teacher has.
COMMON = {
    "none": (0, V_T),
    "one": (1, V_T),
    "some": (6, V_T),
    "all of the student": (V, V_T),
    "all of the teacher": (6, 6),
    "all": (V, V),
}
CASES = {name: (common, HEADS["all"]) for name, common in COMMON.items()} | {
    name: (COMMON["some"], HEADS[name]) for name in ("plain", "temperatures")
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Case:
    """Two heads of different sizes, and pairs of ids."""

    def __init__(
        self,
        common: int,
        teacher: int = V_T,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        spread: float = 2.0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=g, dtype=torch.float64) * spread**0.5).to(dtype)

        self.student = normal(N, D), normal(V, D), normal(V)
        self.teacher = normal(N, D_T), normal(teacher, D_T), normal(teacher)
        self.ids = torch.randperm(V, generator=g)[:common], torch.randperm(teacher, generator=g)[:common]

    def double(self) -> Case:
        found = Case(len(self.ids[0]))
        for side in ("student", "teacher"):
            hidden, weight, bias = getattr(self, side)
            setattr(found, side, (hidden.double(), weight.double(), bias.double()))
        found.ids = self.ids
        return found

    def loss(self, kind: str, options: dict[str, Any], **more: Any) -> tuple[loss.LossOutput, list[Tensor]]:
        """And the gradients by the student's tensors."""
        hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in self.student)
        ours = {name: value for name, value in options.items() if not name.startswith("teacher_")}
        teacher = common_vocabulary_logits(
            hidden, weight, *self.teacher[:2], *self.ids, bias=bias, teacher_bias=self.teacher[2], **options
        )
        function = getattr(loss, f"{kind}_loss")
        output = function(hidden, weight, teacher_logits=teacher, bias=bias, **ours, **KINDS[kind], **more)
        output.loss.sum().backward()
        self.rests = teacher.rests
        return output, [tensor.grad for tensor in (hidden, weight, bias) if tensor.grad is not None]

    def wanted(self, kind: str, options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """From all logits at once, by autograd."""
        leaves = [tensor.clone().requires_grad_() for tensor in self.student]
        own: dict[str, Any] = {
            name: options[name] for name in ("temperature", "logit_scale", "softcap") if name in options
        }
        theirs = {"temperature": options.get("temperature", 1.0)} | {
            name.removeprefix("teacher_"): value for name, value in options.items() if name.startswith("teacher_")
        }
        z = reference.logits(leaves[0], leaves[1], leaves[2], **own)
        z_t = reference.logits(*self.teacher, **theirs)
        p, q = reference.common_vocabulary(z, z_t, *self.ids)
        values = getattr(reference, kind)(p, q, **KINDS[kind])
        values.sum().backward()
        common = (torch.softmax(x, -1)[:, ids].sum(-1) for x, ids in zip((z, z_t), self.ids, strict=True))
        self.wanted_rests = (1.0 - torch.stack([*common])).detach()
        return values.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@kinds
@pytest.mark.parametrize(("common", "options"), CASES.values(), ids=CASES)
def test_value_and_gradient_are_those_over_the_common_tokens(
    kind: str, common: tuple[int, int], options: dict[str, Any]
) -> None:
    case = Case(*common)
    if kind == "total_variation" and not common[0]:
        return  # the sign of 1 - 1 is one of rounding
    output, gradients = case.loss(kind, options, reduction="none", chunk_size=4)
    values, expected = case.wanted(kind, options)
    torch.testing.assert_close(output.loss, values)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(case.rests, case.wanted_rests)


@PROPERTY
@given(st.data())
def test_masks_forbidden_tokens_and_any_pairs(data: st.DataObject) -> None:
    """Biases of −inf on either side, on common tokens and others; masked tokens, and weights."""
    teacher = data.draw(st.sampled_from([9, V, V_T]))
    case = Case(
        data.draw(st.integers(0, min(V, teacher))),
        teacher,
        seed=data.draw(st.integers(0, 99)),
        spread=data.draw(st.sampled_from([1.0, 30.0])),
    )
    kind = data.draw(st.sampled_from([name for name in KINDS if name != "total_variation"]))
    for bias, size in ((case.student[2], V), (case.teacher[2], teacher)):
        forbidden = data.draw(st.lists(st.integers(0, size - 2), max_size=size - 1, unique=True))
        bias[forbidden] = -torch.inf
    mask = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=N, max_size=N)))
    output, (by_hidden, *_) = case.loss(kind, {}, reduction="none", mask=mask)
    values, (expected, *_) = case.wanted(kind, {})
    torch.testing.assert_close(output.loss, torch.where(mask > 0, mask * values, 0.0))
    finite = (values.isfinite() & ~expected.isnan().any(1))[:, None]  # autograd's are NaN where a side has no rest
    torch.testing.assert_close(by_hidden.where(finite, 0.0), (expected * mask[:, None]).where(finite, 0.0))
    assert ((output.loss >= -1e-12) | output.loss.isnan()).all()


@kinds
def test_one_vocabulary_makes_it_the_plain_loss(kind: str) -> None:
    """And of two equal heads it is 0."""
    case = Case(V)
    case.ids = torch.arange(V), torch.arange(V)
    case.teacher = case.teacher[0], case.teacher[1][:V], case.teacher[2][:V]
    output, gradients = case.loss(kind, HEADS["all"])
    leaves = [tensor.clone().requires_grad_() for tensor in case.student]
    own = {"bias": leaves[2], "teacher_bias": case.teacher[2], **HEADS["all"], **KINDS[kind]}
    plain = getattr(loss, f"{kind}_loss")(*leaves[:2], *case.teacher[:2], **own, teacher_logit_scale=1.0)
    plain.loss.backward()
    torch.testing.assert_close(output.loss, plain.loss)
    for ours, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad)
    case.teacher = case.student
    output, gradients = case.loss(kind, {})
    assert abs(output.loss.item()) < 1e-12
    assert kind == "total_variation" or max(float(g.abs().max()) for g in gradients) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_in_16_bits_it_is_the_loss_of_the_rounded_heads(dtype: torch.dtype, autocast: bool) -> None:
    case = Case(6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, gradients = case.loss("reverse_kl", {"temperature": 0.7}, reduction="sum")
    rounded = Case(6, dtype=torch.bfloat16 if autocast else dtype).double()
    values, expected = rounded.wanted("reverse_kl", {"temperature": 0.7})
    torch.testing.assert_close(output.loss.double(), values.sum(), rtol=1e-4, atol=1e-4)
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(gradients[0].double(), expected[0], rtol=0.02, atol=0.02)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "outside": ({"student_ids": torch.tensor([0, V])}, ValueError, rf"student_ids holds {V}, outside the vocabulary"),
    "below": ({"teacher_ids": torch.tensor([0, -1])}, ValueError, r"teacher_ids holds -1, outside the vocabulary"),
    "twice": ({"teacher_ids": torch.tensor([3, 3])}, ValueError, r"teacher_ids holds an id twice"),
    "pairs": ({"teacher_ids": torch.tensor([3])}, ValueError, r"student_ids has 2 ids and teacher_ids 1"),
    "shape": ({"student_ids": torch.tensor([[1], [2]])}, ValueError, r"student_ids is \[2, 1\]; expected \[C\]"),
    "dtype": ({"student_ids": torch.ones(2)}, TypeError, r"student_ids is torch.float32; expected integers"),
    "tokens": (
        {"teacher_hidden": torch.ones(N + 1, D_T)},
        ValueError,
        r"teacher_hidden is \[7, 7\] but student_hidden",
    ),
    "float64": (
        {"teacher_hidden": torch.ones(N, D_T).double(), "teacher_weight": torch.ones(V_T, D_T).double()},
        TypeError,
        r"teacher_hidden is torch.float64 but student_hidden is torch.float32",
    ),
    "temperature": ({"teacher_temperature": 0.0}, ValueError, r"teacher_temperature is 0.0"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    case, ids = Case(0, dtype=torch.float32), torch.tensor([1, 2])
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    given = dict(zip(names, (*case.student[:2], *case.teacher[:2]), strict=True))
    with pytest.raises(error, match=message):
        common_vocabulary_logits(**{**given, "student_ids": ids, "teacher_ids": ids, **changes})
