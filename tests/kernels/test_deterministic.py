"""No path has an operator that torch lists as non-deterministic on CUDA, or one that adds floats in no fixed order.

The list is mocked on a CPU (tests/support/cuda/determinism.py). The paths of Triton are in sparse/test_triton.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import with_gradients
from determinism import NEVER, SOMETIMES, RefusesNonDeterminism, refused_non_determinism
from loss_cases import LOSSES, frozen_or_all
from loss_cases import fused as fused_loss
from problem import make_problem
from sparse_cases import use_small_blocks
from torch import Tensor

from fastkl import loss
from fastkl.kernels.sparse import probabilities
from fastkl.kernels.sparse.probabilities import running_sums, threshold
from fastkl.loss import Sparse

IDS = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 3, 3]])
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOSSES},
    **{f"{name}-none": (name, {"reduction": "none"}) for name in LOSSES if name != "linear_logprobs"},
    "sequences": ("policy_gradient", {"ratio": "sequence", "reduction": "sequence_mean", "sequence_ids": IDS}),
    "discount": ("sampled_reverse_kl", {"discount": 0.5, "sequence_ids": IDS}),
    "padded-list": ("top_k", {"padded": 2, "direction": "forward", "tail": "drop"}),
    "per_token": ("reverse_kl", {"per_token": True, "temperature": 0.7}),
    "softcap": ("jsd", {"softcap": 2.5, "teacher_softcap": 3.0}),
    "skip_zero_rows": ("policy_gradient", {"skip_zero_rows": True}),
}


@frozen_or_all
@pytest.mark.parametrize("backward", ["exact", Sparse(1, error=0.3)], ids=["exact", "sparse"])
@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_losses(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], backward: Any, needs: tuple[str, ...]
) -> None:
    """Nor does a result depend on memory that was not written: there it is NaN."""
    use_small_blocks(monkeypatch)
    monkeypatch.setattr(probabilities, "BREAK_EVEN", 2.0)  # a sample, however flat the rows are
    p = make_problem((2, 6), 40, dtype=torch.float32, spread=4.0)
    options = {"skip_zero_rows": False, **options, "backward": backward}
    plain = with_gradients(fused_loss, name, p, needs, **options)
    with refused_non_determinism(monkeypatch) as mode:
        found = with_gradients(fused_loss, name, p, needs, **options)
    assert {"addmm", "fill"} & mode.seen, "the mode has not seen the driver"
    assert torch.equal(found.value, plain.value)
    for field, gradient in found.gradients.items():
        assert torch.equal(gradient, plain.gradients[field])


def test_functions_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_problem((2, 6), 40, dtype=torch.float32)
    with refused_non_determinism(monkeypatch):
        loss.linear_top_k(p.hidden, p.weight, 3)
        loss.linear_list_logprobs(p.hidden, p.weight, p.tokens[..., None].clamp(min=-1))
        loss.linear_ranks(p.hidden, p.weight, p.tokens)
        logprobs, packed = (p.sampler_logprobs, p.teacher_logprobs), {"discount": 0.5, "sequence_ids": IDS}
        advantages = loss.reverse_kl_advantages(*logprobs, power=0.5, **packed)
        loss.extrapolated_advantages(*logprobs, p.teacher_logprobs, extrapolate=1.25, **packed)
        loss.centred_advantages(advantages, sequence_ids=IDS)
        loss.redistributed_advantages(advantages, *logprobs, share=0.5)


@frozen_or_all
@pytest.mark.parametrize("entropy_grad", [True, False])
def test_token_stats(monkeypatch: pytest.MonkeyPatch, entropy_grad: bool, needs: tuple[str, ...]) -> None:
    p = make_problem((2, 6), 40, dtype=torch.float32).leaves(needs)
    with refused_non_determinism(monkeypatch) as mode:
        stats = loss.linear_token_stats(p.hidden, p.weight, p.tokens, bias=p.bias, entropy_grad=entropy_grad)
        (stats.logprobs + stats.lse).sum().backward()
    assert {"addmm", "fill"} & mode.seen, "the mode has not seen the driver"


@frozen_or_all
def test_a_teacher_with_another_vocabulary(monkeypatch: pytest.MonkeyPatch, needs: tuple[str, ...]) -> None:
    p = make_problem((2, 6), 40, dtype=torch.float32).leaves(needs)
    student, teacher = torch.arange(0, 30), torch.arange(30).flip(0)
    with refused_non_determinism(monkeypatch) as mode:
        heads = p.hidden, p.weight, p.teacher_hidden, p.teacher_weight
        logits = loss.common_vocabulary_logits(*heads, student, teacher)
        loss.reverse_kl_loss(p.hidden, p.weight, teacher_logits=logits).loss.backward()
    assert {"addmm", "fill"} & mode.seen, "the mode has not seen the driver"


def test_every_public_function_is_here() -> None:
    public = {name for name in loss.__all__ if inspect.isfunction(getattr(loss, name))}
    advantages = {f"{kind}_advantages" for kind in ("reverse_kl", "extrapolated", "centred", "redistributed")}
    without = {"linear_top_k", "linear_list_logprobs", "linear_ranks", "linear_token_stats"} | advantages
    without.add("common_vocabulary_logits")
    assert public == without | {one.function.__name__ for one in LOSSES.values()}


def test_the_list_is_that_of_torch() -> None:
    text = torch.use_deterministic_algorithms.__doc__
    assert text is not None
    listed = set(re.findall(r"\* :(?:class|func):`([\w.]+)`", text))
    assert len(listed) > 30
    assert listed <= NEVER.keys() | SOMETIMES.keys()


X, TWICE = torch.rand(4), torch.tensor([1, 1])
REFUSED: dict[str, Callable[[], Tensor]] = {
    "cumsum": lambda: X.cumsum(0),
    "cumsum of integers into floats": lambda: TWICE.cumsum(0, dtype=torch.float32),
    "median": lambda: X.median(0).values,
    "nll_loss": lambda: torch.nn.functional.nll_loss(X[None], TWICE[:1]),
    "index_add": lambda: X.index_add(0, TWICE, X[:2]),
    "index_copy": lambda: X.index_copy(0, TWICE, X[:2]),
    "scatter_add": lambda: X.scatter_add(0, TWICE, X[:2]),
    "scatter": lambda: X.scatter(0, TWICE, X[:2]),
    "index_put": lambda: X.index_put((TWICE,), X[:2]),
    "accumulate": lambda: X.index_put((TWICE,), X[:2], accumulate=True),
    "bincount": lambda: TWICE.bincount(X[:2]),
    "histc": lambda: X.histc(),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_the_mode_refuses(call: Callable[[], Tensor]) -> None:
    with RefusesNonDeterminism(), pytest.raises(RuntimeError, match=r"not deterministic|several times"):
        call()


def test_the_mode_lets_pass() -> None:
    with RefusesNonDeterminism():
        TWICE.cumsum(0)
        X.median()
        X.index_add(0, torch.tensor([2, 1]), X[:2])
        X.scatter(0, TWICE, X[0].expand(2))
        TWICE.index_add(0, TWICE, TWICE)


def test_running_sums_have_no_order() -> None:
    """Of a permutation too, they end in the same bits; and they are those of float64."""
    x = torch.rand(9000, dtype=torch.float64).square().square()
    shuffled = x[torch.randperm(9000)]
    assert running_sums(x)[-1] == running_sums(shuffled)[-1]
    torch.testing.assert_close(running_sums(x), x.cumsum(0), rtol=0, atol=9000 * 2.0**-48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e15])
@pytest.mark.parametrize("error", [1e-4, 2e-3, 0.3])
def test_threshold_of_hard_columns(dtype: torch.dtype, size: float, error: float) -> None:
    """One column that has nearly all, and a tail over eight powers of ten: the variance is the one asked for."""
    w = size * torch.logspace(-8, -2, 16000, dtype=torch.float64)
    w[7] = size
    variance = error**2 * w.square().sum()
    tau = threshold(w.to(dtype), variance.to(dtype)).double()
    found = (w * (tau - w).clamp(min=0)).sum()
    torch.testing.assert_close(found, variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_threshold_does_not_hide_what_is_not_finite(wrong: float) -> None:
    w = torch.rand(100)
    w[3] = wrong
    assert threshold(w, torch.tensor(wrong)).isnan()
