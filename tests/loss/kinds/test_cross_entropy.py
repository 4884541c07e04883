"""`linear_cross_entropy` against torch's own, in every combination of its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import Result, assert_results_as_accurate, assert_same
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import HEADS, NEEDS, each_need
from problem import Problem, generator, make_problem
from property_settings import PROPERTY
from sparse_cases import use_small_blocks
from torch import Tensor

from fastkl import reference
from fastkl.kernels import driver
from fastkl.loss import LossOutput, Predictions, Sparse, linear_cross_entropy

OPTIONS = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 0.01]),
        "class_weight": st.booleans(),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
)


def class_weights(vocabulary: int, dtype: torch.dtype = torch.float64) -> Tensor:
    weights = torch.rand(vocabulary, generator=generator(vocabulary), dtype=torch.float64)
    weights[::4] = 0.0
    return weights.to(dtype)


def ours(p: Problem, class_weight: bool = False, **options: Any) -> LossOutput:
    c = class_weights(p.weight.shape[0]) if class_weight else None
    return linear_cross_entropy(p.hidden, p.weight, p.tokens, bias=p.bias, class_weight=c, **options)


def torchs(
    p: Problem, class_weight: bool = False, z_loss: float = 0.0, label_smoothing: float = 0.0, **options: Any
) -> Tensor:
    """F.cross_entropy, and the mean or sum of the z-loss over tokens."""
    head = {k: v for k, v in options.items() if k in ("temperature", "logit_scale", "softcap")}
    z = reference.logits(p.hidden, p.weight, p.bias, **head)
    c = class_weights(p.weight.shape[0], z.dtype) if class_weight else None
    reduction, counted = options.get("reduction", "mean"), p.tokens != -100
    flat = z.flatten(0, -2), p.tokens.flatten()
    plain = F.cross_entropy(*flat, weight=c, label_smoothing=label_smoothing, reduction=reduction)
    z_terms = (z_loss * torch.logsumexp(z, -1).square()).where(counted, 0.0)
    if reduction == "none":
        return plain.reshape(p.tokens.shape) + z_terms
    return plain + (z_terms.sum() if reduction == "sum" else z_terms.sum() / counted.sum())


def result(loss: Tensor, p: Problem, needs: tuple[str, ...]) -> Result:
    upstream = torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    gradients = torch.autograd.grad(loss, [getattr(p, field) for field in needs], upstream)
    return Result(loss.detach(), dict(zip(needs, gradients, strict=True)))


@PROPERTY
@given(st.integers(0, 2**31), st.sampled_from(sorted(NEEDS)), st.sampled_from(sorted(HEADS)), st.booleans(), OPTIONS)
def test_torchs_cross_entropy(seed: int, need: str, head: str, skip: bool, options: dict[str, Any]) -> None:
    needs = NEEDS[need]
    p, q = (make_problem((2, 5), seed=seed).leaves(needs) for _ in range(2))
    if not (p.tokens % 4 != 0).logical_and(p.tokens != -100).any():  # torch's mean is NaN
        return
    found = ours(p, skip_zero_rows=skip, **HEADS[head], **options)
    assert_same(result(found.loss, p, needs), result(torchs(q, **HEADS[head], **options), q, needs))
    with torch.no_grad():
        again = ours(p, **HEADS[head], **options)
    torch.testing.assert_close((again.loss, again.metrics), (found.loss.detach(), found.metrics))


@PROPERTY
@given(st.integers(0, 2**31), st.sampled_from(sorted(NEEDS)), st.sampled_from(sorted(HEADS)), OPTIONS)
def test_accuracy(seed: int, need: str, head: str, options: dict[str, Any]) -> None:
    """No less accurate than torch in the same dtype, on a vocabulary of several tiles."""
    needs, p = NEEDS[need], make_problem((2, 5), 700, 12, torch.float32, seed)
    leaves = [p.leaves(needs), p.leaves(needs), p.double().leaves(needs)]
    found = result(ours(leaves[0], **HEADS[head], **options).loss, leaves[0], needs)
    peer, exact = (result(torchs(q, **HEADS[head], **options), q, needs) for q in leaves[1:])
    assert_results_as_accurate(found, peer, exact, p, **HEADS[head])


@each_need
def test_masks_and_normalizers(needs: tuple[str, ...]) -> None:
    """The mask multiplies losses and what they are divided by; a normalizer takes the place of both divisors."""
    p = make_problem((2, 5)).leaves(needs)
    options = {"label_smoothing": 0.2, "z_loss": 0.03}
    c, mask = class_weights(11), p.mask * (p.tokens != -100)
    each = torchs(p, class_weight=True, label_smoothing=0.2, reduction="none") * mask
    z = (0.03 * torch.logsumexp(reference.logits(p.hidden, p.weight, p.bias), -1).square()) * mask
    expected = each.sum() / (mask * c[p.tokens.clamp(min=0)]).sum() + z.sum() / mask.sum()
    found = ours(p, class_weight=True, mask=p.mask, **options).loss
    assert_same(result(found, p, needs), result(expected, p, needs))
    for normalizer in (7, torch.tensor(7)):
        found = ours(p, class_weight=True, mask=p.mask, normalizer=normalizer, **options).loss
        torch.testing.assert_close(found, (each.sum() + z.sum()) / 7)


def test_nothing_counts() -> None:
    """0 in place of NaN: all ignored, no token at all, or classes of no weight."""
    p = make_problem((3,)).leaves()
    ignored = p._replace(tokens=torch.full((3,), -100))
    weightless = p._replace(tokens=torch.tensor([0, 4, 8]))
    empty = p._replace(hidden=p.hidden[:0], tokens=p.tokens[:0])
    for q, options in ((ignored, {"z_loss": 0.1}), (weightless, {}), (empty, {"label_smoothing": 0.1})):
        found = ours(q, class_weight=True, **options)
        assert found.loss.item() == 0.0
        assert all(float(metric) == 0.0 for name, metric in found.metrics.items() if q is not weightless)
        gradients = torch.autograd.grad(found.loss, [p.hidden, p.weight, p.bias])
        assert not any(gradient.any() for gradient in gradients)


def test_what_it_says_of_each_token() -> None:
    p = make_problem((3, 4), 700, 8).leaves()
    found, z = ours(p, per_token=True, softcap=3.0), reference.logits(p.hidden, p.weight, p.bias, softcap=3.0)
    counted = p.tokens != -100
    assert isinstance(found.per_token, Predictions)
    assert torch.equal(found.per_token.ids, z.argmax(-1).where(counted, -1))
    torch.testing.assert_close(found.per_token.lse, torch.logsumexp(z, -1).where(counted, 0.0))
    torch.testing.assert_close(found.logprobs, reference.logprobs(z, p.tokens))
    assert not found.logprobs.requires_grad
    with torch.no_grad():
        again = ours(p, per_token=True, softcap=3.0)
    torch.testing.assert_close(tuple(again), tuple(found._replace(loss=found.loss.detach())))
    assert ours(p).per_token is None


def test_metrics() -> None:
    """Of tokens, by no weight: a mask of ½ counts as one of 1."""
    p = make_problem((40,)).leaves()
    z, active = reference.logits(p.hidden, p.weight, p.bias), (p.tokens != -100) & (p.mask != 0)
    metrics = ours(p, class_weight=True, mask=p.mask, label_smoothing=0.1, z_loss=0.2).metrics
    expected = {
        "cross_entropy": -reference.logprobs(z, p.tokens)[active].mean(),
        "accuracy": (z.argmax(-1) == p.tokens)[active].double().mean(),
        "z_loss": 0.2 * torch.logsumexp(z, -1).square()[active].mean(),
    }
    torch.testing.assert_close(metrics, {name: metric.detach() for name, metric in expected.items()})
    assert metrics.keys() == {"cross_entropy", "accuracy", "z_loss"}
    assert "z_loss" not in ours(p).metrics


def test_a_padded_vocabulary() -> None:
    """Label smoothing leaves the padding alone."""
    p, q = make_problem((6,)).leaves(), make_problem((6,)).leaves()
    p.tokens.clamp_(max=7)
    small = q._replace(weight=q.weight[:8], bias=q.bias[:8], tokens=p.tokens)
    c = class_weights(11)
    found = linear_cross_entropy(
        p.hidden, p.weight, p.tokens, bias=p.bias, class_weight=c, vocab_size=8, label_smoothing=0.2
    )
    z = reference.logits(small.hidden, small.weight, small.bias)
    expected = F.cross_entropy(z, small.tokens, weight=c[:8], label_smoothing=0.2)
    assert_same(result(found.loss, p, NEEDS["all"]), result(expected, q, NEEDS["all"]))


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "class_weight": True}], ids=["", "all"]
)
def test_gemms(gemms: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """One of each: logits, the gradient of hidden, that of the weight. No reduction: the logits again."""
    monkeypatch.setattr(driver, "scorer", lambda spec, inputs: None)
    for needs, reduction, units in (
        ((), "mean", (1, 0, 0)),
        (("hidden",), "mean", (1, 1, 0)),
        (("hidden", "weight"), "mean", (1, 1, 1)),
        (("hidden",), "none", (1, 1, 0)),
        (("hidden", "weight"), "none", (2, 1, 1)),
    ):
        p = make_problem((10,))._replace(tokens=torch.arange(10)).leaves(needs)
        for calls in gemms.values():
            calls.clear()
        with torch.set_grad_enabled(bool(needs)):
            loss = ours(p, reduction=reduction, **options).loss
        if needs:
            loss.sum().backward()
        assert tuple(sum(calls) // 10 for calls in gemms.values()) == units, (needs, reduction)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=["plain", "smoothed"])
def test_a_sparse_backward(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Its mean over seeds is the exact gradient."""
    use_small_blocks(monkeypatch)
    needs = ("hidden", "weight")
    p = make_problem((24,), 300, spread=5.0).leaves(needs)
    exact = result(ours(p, **options).loss, p, needs)
    drawn = [result(ours(p, backward=Sparse(seed, error=0.3), **options).loss, p, needs) for seed in range(60)]
    for field, gradient in exact.gradients.items():
        each = torch.stack([one.gradients[field] for one in drawn])
        assert float((each.mean(0) - gradient).norm()) < 0.1 * float(gradient.norm())
    assert {"kept_fraction", "grad_error"} <= ours(p, backward=Sparse(1), **options).metrics.keys()


def test_a_low_precision_head() -> None:
    """Class weights in another dtype than the head; the loss is float32."""
    p = make_problem((6,), dtype=torch.bfloat16).leaves()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        c = torch.ones(11, dtype=dtype)
        found = linear_cross_entropy(p.hidden, p.weight, p.tokens, class_weight=c, label_smoothing=0.1)
        plain = linear_cross_entropy(p.hidden, p.weight, p.tokens, label_smoothing=0.1)
        assert found.loss.dtype == torch.float32
        torch.testing.assert_close(found.loss, plain.loss)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
def test_torchs_fused_one(options: dict[str, Any]) -> None:
    p, q = make_problem((9,)).leaves(), make_problem((9,)).leaves()
    theirs = F.linear_cross_entropy(q.hidden, q.weight, q.tokens, linear_bias=q.bias, ignore_index=-100, **options)
    assert_same(result(ours(p, **options).loss, p, NEEDS["all"]), result(theirs, q, NEEDS["all"]))
