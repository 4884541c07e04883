"""Options that are one number each: what is none is refused by name, in every loss, before anything is computed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from loss_cases import LOSSES, fused
from problem import make_problem
from torch import Tensor, tensor

from fastkl import loss

P = make_problem((2, 3), vocabulary=7, dim=4, dtype=torch.float32)
NONE_OF_THEM = (None, "0.5", tensor([0.5, 0.5]), tensor(0.5j), numpy.array([0.5, 0.5]), numpy.array([0.5]))
OPTIONAL = (
    "softcap",
    "teacher_softcap",
    "dual_clip",
    "truncate_ratio",
    "teacher_temperature",
    "chunk_size",
    "vocab_size",
)


def numbers() -> Iterator[tuple[str, str]]:
    """Each loss with each of its options that is a number."""
    for name, one in LOSSES.items():
        for option, parameter in inspect.signature(one.function).parameters.items():
            kind = str(parameter.annotation)
            if kind in ("float", "float | None", "<class 'float'>", "<class 'int'>"):
                yield name, option


EACH = sorted(set(numbers()))


def test_they_are_found() -> None:
    found = {option for _, option in EACH}
    assert found >= {"temperature", "ignore_index", "label_smoothing", "ref_kl_coef", "beta", "discount", "dual_clip"}


@pytest.mark.parametrize(("name", "option"), EACH)
def test_no_number(name: str, option: str) -> None:
    for value in NONE_OF_THEM[option in OPTIONAL :]:  # None is first
        with pytest.raises(
            (TypeError, ValueError), match=rf"^{option} is (None|'0.5'|an? (tensor|array) \[.\]|tensor|torch.c|array)"
        ):
            fused(name, P, **{option: value})


@pytest.mark.parametrize("option", ["temperature", "logit_scale", "softcap", "label_smoothing", "z_loss"])
def test_a_gradient_that_would_be_lost(option: str) -> None:
    learned = tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=f"^{option} requires a gradient"):
        fused("cross_entropy", P, **{option: learned})
    with torch.no_grad():
        assert torch.equal(fused("cross_entropy", P, **{option: learned}), fused("cross_entropy", P, **{option: 0.5}))


@pytest.mark.parametrize(
    ("name", "option"),
    [("cross_entropy", "class_weight"), ("cross_entropy", "mask"), ("policy_gradient", "advantages")],
)
def test_constants(name: str, option: str) -> None:
    """What weighs tokens or ids may require a gradient, and gets none."""
    weights = torch.rand(7 if option == "class_weight" else (2, 3), requires_grad=True)
    p = P._replace(hidden=P.hidden.clone().requires_grad_())
    options = {option: weights} if option == "class_weight" else {}
    p = p if options else p._replace(**{option: weights})
    fused(name, p, **options).backward()
    assert weights.grad is None
    assert p.hidden.grad is not None


@pytest.mark.parametrize("half", [numpy.float32(0.5), numpy.float64(0.5), tensor(0.5), tensor([0.5])], ids=repr)
def test_other_numbers(half: Any) -> None:
    options = {"temperature": half, "label_smoothing": half, "z_loss": half, "normalizer": float(half)}
    plain = dict.fromkeys(options, 0.5)
    assert torch.equal(fused("cross_entropy", P, **options), fused("cross_entropy", P, **plain))


@pytest.mark.parametrize("normalizer", ["8", [8]])
def test_no_normalizer(normalizer: Any) -> None:
    with pytest.raises(TypeError, match=r"^normalizer is"):
        fused("reverse_kl", P, normalizer=normalizer)


def test_normalizer_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"^normalizer is on meta but hidden is on cpu"):
        fused("reverse_kl", P, normalizer=tensor(8, device="meta"))


@pytest.mark.parametrize("bounds", [("a", "b"), (None, 2.0), ([0.5], 2.0)], ids=str)
def test_bounds(bounds: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^ratio_bounds"):
        fused("policy_gradient", P, ratio_bounds=bounds)


@pytest.mark.parametrize("vocab_size", [numpy.int64(7), tensor(7), 7.0, True], ids=repr)
def test_vocab_size(vocab_size: Any) -> None:
    with pytest.raises(ValueError, match=rf"^vocab_size is {re.escape(repr(vocab_size))}; it must be an int"):
        fused("reverse_kl", P, vocab_size=vocab_size)


@pytest.mark.parametrize("k", [2.0, True, "2", None])
def test_k(k: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^k is {k!r}; "):
        loss.linear_top_k(P.hidden, P.weight, k)


def test_ids_beyond_vocab_size() -> None:
    """The limit is vocab_size, not the weight's."""
    with pytest.raises(ValueError, match=r"holds the id 6, outside the vocabulary \(0 … 4\)"):
        loss.linear_token_stats(P.hidden, P.weight, torch.full((2, 3), 6), vocab_size=5)


@pytest.mark.parametrize("size", [5, 7])
def test_class_weights_of_a_padded_head(size: int) -> None:
    """[V], or as many as the tokenizer has ids."""
    targets, weights = P.tokens.clamp(0, 4), torch.rand(size)

    def cross_entropy(head: Tensor, **options: Any) -> Tensor:
        return loss.linear_cross_entropy(P.hidden, head, targets, class_weight=weights, **options).loss

    cut = loss.linear_cross_entropy(P.hidden, P.weight[:5], targets, class_weight=weights[:5]).loss
    assert torch.equal(cross_entropy(P.weight, vocab_size=5), cut)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3)], ids=str)
def test_advantages_of_no_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected one entry per token, \[2, 3\], or one per row, \[2\]"):
        loss.policy_gradient_loss(P.hidden, P.weight, P.tokens, torch.ones(shape))
