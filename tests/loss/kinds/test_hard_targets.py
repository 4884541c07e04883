"""`hard_coef`: a divergence and the cross-entropy of its tokens in one pass, against the two apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import Result, assert_results_as_accurate, assert_same, with_gradients
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import DIVERGENCES, HEADS, NEEDS, eager, fused, fused_output
from problem import Problem, make_problem
from property_settings import PROPERTY
from torch import Tensor

from fastkl import reference
from fastkl.kernels import workspace
from fastkl.kernels.options import DIRECTIONS, TAILS
from fastkl.loss import Sparse, forward_kl_loss, linear_cross_entropy, reverse_kl_loss, top_k_kl_loss

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in DIVERGENCES},
    **{f"top_k-{d}-{t}": ("top_k", {"direction": d, "tail": t}) for d in DIRECTIONS for t in TAILS},
    "sampled_tail": ("sampled_tail", {}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
ACCURATE = ("forward_kl", "reverse_kl", "jsd", "total_variation")
COEF = 0.7


def hard(name: str, p: Problem, **options: Any) -> Tensor:
    return fused(name, p, hard_coef=COEF, **options)


def apart(name: str, p: Problem, squared_temperature: bool = False, reduction: str = "mean", **options: Any) -> Tensor:
    """The divergence and the cross-entropy of the plain head, weighted and reduced."""
    temperature = options.get("temperature", 1.0)
    z = reference.logits(
        p.hidden, p.weight, p.bias, **{k: v for k, v in options.items() if k in ("logit_scale", "softcap")}
    )
    z = z.float() if z.dtype == torch.float16 else z
    mask = p.mask * (p.tokens != -100)
    soft = eager(name, p, reduction="none", **options) * (temperature**2 if squared_temperature else 1.0)
    each = soft - torch.where(mask != 0, COEF * mask * reference.logprobs(z, p.tokens), 0.0)
    return {"none": each, "sum": each.sum(), "mean": each.sum() / mask.sum()}[reduction]


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted(NEEDS)),
    st.sampled_from(sorted(HEADS)),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
    st.booleans(),
)
def test_both_parts(
    seed: int, kind: str, need: str, head: str, reduction: str, squared_temperature: bool, skip: bool
) -> None:
    (name, own), p = KINDS[kind], make_problem((2, 5), seed=seed)
    if not (p.mask * (p.tokens != -100)).any():
        return
    options = {"reduction": reduction, "squared_temperature": squared_temperature, **HEADS[head], **own}
    ours = with_gradients(hard, name, p, NEEDS[need], skip_zero_rows=skip, **options)
    assert_same(ours, with_gradients(apart, name, p, NEEDS[need], **options))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind", ["forward_kl", "reverse_kl", "jsd", "total_variation", "top_k-reverse-bucket", "sampled_tail"]
)
def test_accuracy(kind: str, dtype: torch.dtype, temperature: float) -> None:
    """No less accurate than the two apart, where tokens are nearly certain too."""
    (name, own), p = KINDS[kind], make_problem((3, 7), 60, 16, dtype, spread=6.0)
    z = reference.logits(*(t.double() for t in (p.hidden, p.weight, p.bias)))
    p = p._replace(tokens=torch.where(torch.arange(21).reshape(3, 7) % 2 == 0, z.argmax(-1), p.tokens))
    ours = with_gradients(hard, name, p, temperature=temperature, **own)
    peer, exact = (with_gradients(apart, name, q, temperature=temperature, **own) for q in (p, p.double()))
    assert_results_as_accurate(ours, peer, exact, p)


@each_kind
def test_metrics_and_values_are_of_each_part(kind: str) -> None:
    name, own = KINDS[kind]
    p = make_problem((2, 5))
    with_hard, without = (
        fused_output(name, p, hard_coef=coef, temperature=2.0, squared_temperature=True, **own) for coef in (COEF, 0.0)
    )
    plain = linear_cross_entropy(p.hidden, p.weight, p.tokens, bias=p.bias, mask=p.mask)
    torch.testing.assert_close(with_hard.metrics, without.metrics | {"cross_entropy": plain.metrics["cross_entropy"]})
    torch.testing.assert_close(with_hard.logprobs, without.logprobs)
    torch.testing.assert_close(with_hard.loss, without.loss + COEF * plain.loss)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_by_products_stay(name: str) -> None:
    p = make_problem((2, 5)).leaves()
    with_hard, without = (fused_output(name, p, hard_coef=coef, per_token=True) for coef in (COEF, 0.0))
    torch.testing.assert_close(with_hard.per_token, without.per_token)


def test_hintons_recipe() -> None:
    """As the documents write it: α CE + (1 − α) T² KL, the cross-entropy without a temperature."""
    alpha, temperature, p = 0.4, 3.0, make_problem((2, 5)).leaves()
    found = (1 - alpha) * forward_kl_loss(
        p.hidden,
        p.weight,
        p.teacher_hidden,
        p.teacher_weight,
        tokens=p.tokens,
        temperature=temperature,
        squared_temperature=True,
        hard_coef=alpha / (1 - alpha),
    ).loss
    z, z_teacher = reference.logits(p.hidden, p.weight), reference.logits(p.teacher_hidden, p.teacher_weight)
    counted = p.tokens != -100
    kl = torch.nn.functional.kl_div(
        torch.log_softmax(z[counted] / temperature, -1),
        torch.log_softmax(z_teacher[counted] / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    expected = (
        alpha * torch.nn.functional.cross_entropy(z[counted], p.tokens[counted]) + (1 - alpha) * temperature**2 * kl
    )
    fields = [p.hidden, p.weight]
    ours, theirs = (Result(t, dict(zip("hw", torch.autograd.grad(t, fields), strict=True))) for t in (found, expected))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("needs", "units"), [((), (1, 0, 0)), (("hidden",), (1, 1, 0)), (("hidden", "weight"), (1, 1, 1))]
)
@pytest.mark.parametrize("kind", ["jsd", "top_k-reverse-bucket", "sampled_tail"])
def test_no_gemm_more(
    gemms: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    needs: tuple[str, ...],
    units: tuple[int, int, int],
) -> None:
    monkeypatch.setattr(workspace, "_teacher_scores", lambda inputs, rows, options, out: out.normal_())
    (name, own), p = KINDS[kind], make_problem((10,))._replace(tokens=torch.arange(10), mask=None).leaves(needs)
    loss = fused(name, p, hard_coef=COEF, temperature=2.0, **own)
    if needs:
        loss.backward()
    assert tuple(sum(calls) // 10 for calls in gemms.values()) == units


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_certain_token_that_the_list_has_not(direction: str, tail: str) -> None:
    """p¹[y] = 1 within rounding: the gradient of the cross-entropy is next to 0."""
    p = make_problem((2,), 30, 8, torch.float32)._replace(mask=None, bias=None)
    weight = p.weight.clone()
    weight[7] = 40.0 * p.hidden[0] / p.hidden[0].square().sum()
    p = p._replace(weight=weight, tokens=torch.tensor([7, 3]))
    ids, logprobs = torch.tensor([[2, 5], [3, 1]]), torch.tensor([[0.6, 0.3], [0.5, 0.25]]).log()
    found = []
    for q in (p, p.double()):
        q = q.leaves(("hidden",))
        own = {"direction": direction, "tail": tail, "tokens": q.tokens, "hard_coef": 100.0}
        top_k_kl_loss(q.hidden, q.weight, ids, logprobs.to(q.hidden.dtype), **own).loss.backward()
        found.append(q.hidden.grad[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-4, atol=1e-4)


def test_a_sparse_backward() -> None:
    """A small error is nearly none."""
    p = make_problem((24,), 300, spread=5.0)
    exact = with_gradients(hard, "jsd", p)
    sparse = with_gradients(hard, "jsd", p, backward=Sparse(1, error=1e-4))
    for field, gradient in exact.gradients.items():
        torch.testing.assert_close(sparse.gradients[field], gradient, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("kind", ["reverse_kl", pytest.param("top_k-reverse-bucket", marks=pytest.mark.slow)])
def test_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    (name, own), p = KINDS[kind], make_problem((2, 5)).leaves()
    compiled = torch.compile(lambda: hard(name, p, temperature=2.0, **own), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), hard(name, p, temperature=2.0, **own))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard_coef": 0.5}, "hard_coef is 0.5 and needs the tokens of the cross-entropy: pass tokens="),
        ({"hard_coef": -1.0, "tokens": True}, "hard_coef is -1.0; it must be >= 0 and finite"),
        ({"hard_coef": float("nan"), "tokens": True}, "hard_coef is nan"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    p = make_problem()
    if "tokens" in options:
        options = {**options, "tokens": p.tokens}
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        reverse_kl_loss(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, **options)
