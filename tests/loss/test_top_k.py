"""`top_k_kl_loss`: every direction and tail against the reference, what each tail promises, lists as servers send them."""

from __future__ import annotations

from typing import Any

import loss_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import NEEDS, Problem, make_problem
from property_settings import PROPERTY
from torch import Tensor

from fastkl import loss, reference
from fastkl.kernels.top_k.formula import DIRECTIONS, TAILS

FORMS = [(direction, tail) for direction in DIRECTIONS for tail in TAILS]
forms = pytest.mark.parametrize(("direction", "tail"), FORMS)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"temperature": 0.7, "logit_scale": 1.6, "softcap": 2.5, "chunk_size": 4},
}


def teacher_list(p: Problem, k: int, padded: int = 0) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of the problem's teacher; the last `padded` entries of every other row are padding."""
    ids, logprobs = loss_cases.teacher_list(p, k)
    if padded:
        ids[..., ::2, -padded:] = -1
    return ids, logprobs


def ours(p: Problem, ids: Tensor, logprobs: Tensor, **options: Any) -> loss.LossOutput:
    options = {"bias": p.bias, "mask": p.mask, "tokens": p.tokens, **options}
    return loss.top_k_kl_loss(p.hidden, p.weight, ids, logprobs, **options)


def plain(p: Problem, ids: Tensor, logprobs: Tensor, direction: str, tail: str, **options: Any) -> Tensor:
    head = {k: v for k, v in options.items() if k in ("temperature", "logit_scale", "softcap")}
    z = reference.logits(p.hidden, p.weight, p.bias, **head)
    counted = (p.tokens != -100).to(logprobs.dtype)
    mask = counted if p.mask is None else p.mask * counted
    reduction = {k: v for k, v in options.items() if k in ("reduction", "normalizer")}
    return reference.reduce(reference.top_k_kl(z, ids, logprobs, direction, tail), mask, **reduction)


@forms
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_equals_the_reference(
    direction: str, tail: str, head: dict[str, Any], needs: tuple[str, ...], reduction: str
) -> None:
    p = make_problem((2, 6))
    ids, logprobs = teacher_list(p, 4, padded=2)
    found = []
    for function in (lambda *a, **o: ours(*a, **o).loss, plain):
        q = p.leaves(needs)
        value = function(q, ids, logprobs, direction=direction, tail=tail, reduction=reduction, **head)
        upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=torch.float64).reshape(value.shape)
        found.append((value, *torch.autograd.grad(value, [getattr(q, f) for f in needs], upstream)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(direction: str, tail: str, dtype: torch.dtype) -> None:
    """As accurate as plain PyTorch on float32 logits of the same operands."""
    p = make_problem((40,), vocabulary=101, dim=16, dtype=dtype)
    ids, logprobs = teacher_list(p, 10)
    exact = plain(p.double(), ids, logprobs.double(), direction, tail, reduction="none")
    value = ours(p, ids, logprobs, direction=direction, tail=tail, reduction="none").loss
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_whole_vocabulary_listed_is_the_exact_divergence(direction: str) -> None:
    p = make_problem((5,))
    ids, logprobs = teacher_list(p, 11)
    z = reference.logits(p.hidden, p.weight, p.bias)
    z_teacher = reference.logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    exact = {"reverse": reference.reverse_kl, "forward": reference.forward_kl}[direction](z, z_teacher)
    for tail in TAILS:
        value = ours(
            p._replace(mask=None), ids, logprobs, direction=direction, tail=tail, reduction="none", tokens=None
        )
        torch.testing.assert_close(value.loss, exact, rtol=1e-9, atol=1e-12)


@PROPERTY
@given(seed=st.integers(0, 10**6), k=st.integers(1, 10), spread=st.sampled_from([0.5, 1.0, 3.0]))
def test_what_a_bucket_promises(seed: int, k: int, spread: float) -> None:
    """0 ≤ the divergence over k + 1 outcomes ≤ the one over V, in both directions, and more with every token listed."""
    p = make_problem((3,), seed=seed, spread=spread)._replace(mask=None, tokens=torch.zeros(3, dtype=torch.int64))
    z = reference.logits(p.hidden, p.weight, p.bias)
    z_teacher = reference.logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    for direction in DIRECTIONS:
        exact = {"reverse": reference.reverse_kl, "forward": reference.forward_kl}[direction](z, z_teacher)
        few, more = (ours(p, *teacher_list(p, size), direction=direction, reduction="none").loss for size in (k, k + 1))
        assert (few >= -1e-12).all()
        assert (few <= more + 1e-9).all()
        assert (more <= exact + 1e-9).all()


@PROPERTY
@given(seed=st.integers(0, 10**6), k=st.integers(1, 10), form=st.sampled_from(FORMS))
def test_gradient_rows_sum_to_zero(seed: int, k: int, form: tuple[str, str]) -> None:
    """A constant added to all logits changes nothing; the bias' gradient is the sum of the rows'."""
    direction, tail = form
    p = make_problem((3,), seed=seed).leaves(("bias",))
    ours(p, *teacher_list(p, k), direction=direction, tail=tail, reduction="sum").loss.backward()
    assert p.bias is not None
    assert abs(float(p.bias.grad.sum())) < 1e-10


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_student_mass_outside_the_list_is_not_free(direction: str, tail: str) -> None:
    """A student that agrees within the list is pushed back from what is outside it."""
    teacher = torch.tensor([[0.5, 0.3, 0.2]]).log()
    head = torch.eye(6, dtype=torch.float64)
    scores = torch.cat([teacher[0].double(), torch.zeros(3).double()])[None].requires_grad_()
    options: dict[str, Any] = {"direction": direction, "tail": tail}
    found = loss.top_k_kl_loss(scores, head, torch.tensor([[0, 1, 2]]), teacher.double(), **options)
    found.loss.backward()
    assert found.loss > 0.5
    assert (scores.grad[0, 3:] > 0.05).all()


def test_a_student_like_its_teacher_has_no_divergence() -> None:
    p = make_problem((4,))
    same = p._replace(hidden=p.teacher_hidden, weight=p.teacher_weight, bias=p.teacher_bias, mask=None).leaves()
    for direction in DIRECTIONS:
        value = ours(same, *teacher_list(p, 5), direction=direction).loss
        assert abs(value.item()) < 1e-12
        (gradient,) = torch.autograd.grad(value, same.hidden)
        assert float(gradient.abs().max()) < 1e-12


@forms
def test_extreme_rows(direction: str, tail: str) -> None:
    """One-hot students, on the list and off it, in float32: finite, and as float64 has it."""
    vocabulary = 9
    ids = torch.tensor([[0, 1, 2]]).repeat(4, 1)
    logprobs = torch.tensor([[0.7, 0.2, 0.05]]).log().repeat(4, 1)
    z = torch.zeros(4, vocabulary)
    z[0, 0], z[1, 8], z[2], z[3, :3] = 200.0, 60.0, -500.0, 40.0
    exact = reference.top_k_kl(z.double(), ids, logprobs.double(), direction, tail)
    options: dict[str, Any] = {"direction": direction, "tail": tail, "reduction": "none"}
    hidden = z.clone().requires_grad_()
    value = loss.top_k_kl_loss(hidden, torch.eye(vocabulary), ids, logprobs, **options).loss
    finite = exact.isfinite()
    assert torch.equal(value.isfinite() | ~finite, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(value[finite].double(), exact[finite], rtol=1e-5, atol=1e-4)
    value.where(finite, 0.0).sum().backward()
    assert hidden.grad[finite].isfinite().all()


def test_chunks_do_not_matter() -> None:
    p = make_problem((7,))
    whole = ours(p, *teacher_list(p, 3)).loss
    for size in (1, 2, 5):
        torch.testing.assert_close(ours(p, *teacher_list(p, 3), chunk_size=size).loss, whole)


def test_vocab_size() -> None:
    """Padding rows of the student's head take no part, and have a gradient of 0."""
    p = make_problem((4,))
    ids, logprobs = teacher_list(p, 3)
    ids, tokens = ids % 8, p.tokens.clamp(max=8)
    p = p._replace(tokens=tokens)
    cut, whole = p._replace(weight=p.weight[:9], bias=p.bias[:9]).leaves(), p.leaves()
    values = [ours(cut, ids, logprobs).loss, ours(whole, ids, logprobs, vocab_size=9).loss]
    torch.testing.assert_close(values[0], values[1])
    for value in values:
        value.backward()
    torch.testing.assert_close(whole.weight.grad[:9], cut.weight.grad)
    assert (whole.weight.grad[9:] == 0).all()
    with pytest.raises(ValueError, match=r"vocab_size is 12; it must be in 1 … .*\(weight 11\)"):
        ours(p, ids, logprobs, vocab_size=12)


def test_squared_temperature() -> None:
    p = make_problem((4,))
    values = [ours(p, *teacher_list(p, 3), temperature=2.0, squared_temperature=flag).loss for flag in (False, True)]
    torch.testing.assert_close(4.0 * values[0], values[1])


P = make_problem((2, 3), dtype=torch.float32)
IDS, LOGPROBS = teacher_list(P, 4)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "direction": ({"direction": "both"}, ValueError, "direction is 'both'; use one of reverse, forward"),
    "tail": ({"tail": "cut"}, ValueError, "tail is 'cut'; use one of bucket, renormalise, drop"),
    "rows": ({"teacher_ids": IDS[0]}, ValueError, r"teacher_ids is \[3, 4\] but hidden is \[2, 3, 5\]"),
    "k": ({"teacher_logprobs": LOGPROBS[..., :2]}, ValueError, r"teacher_ids is .*4\] but teacher_logprobs is .*2\]"),
    "types": ({"teacher_ids": LOGPROBS}, TypeError, "teacher_ids is torch.float32; expected integers"),
    "twice": ({"teacher_ids": IDS.index_fill(2, torch.tensor([0, 1]), 5)}, ValueError, "lists 5 twice in a row"),
    "logits": ({"teacher_logprobs": LOGPROBS + 3.0}, ValueError, "sum to a probability of .* not logits"),
    "list": ({"teacher_ids": [[1]]}, TypeError, "teacher_ids must be a tensor, not list"),
    "high": ({"teacher_ids": IDS + 11}, ValueError, r"teacher_ids holds \d+, outside the vocabulary .*0 … 10"),
    "empty": ({"teacher_ids": torch.full_like(IDS, -1)}, ValueError, "a row without any id"),
    "gradient": ({"teacher_logprobs": LOGPROBS.clone().requires_grad_()}, ValueError, "requires a gradient"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_refused(case: tuple[dict[str, Any], type[Exception], str]) -> None:
    change, error, message = case
    arguments = {"hidden": P.hidden, "weight": P.weight, "teacher_ids": IDS, "teacher_logprobs": LOGPROBS, **change}
    with pytest.raises(error, match=message):
        loss.top_k_kl_loss(**arguments)


def test_compiled() -> None:
    p = make_problem((5,)).leaves()
    ids, logprobs = teacher_list(p, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: ours(q, ids, logprobs).loss, fullgraph=True, backend="aot_eager")
    values = [function(p) for function in (compiled, lambda q: ours(q, ids, logprobs).loss)]
    torch.testing.assert_close(values[0], values[1])
    gradients = [torch.autograd.grad(value, [p.hidden, p.weight]) for value in values]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_logprobs_and_metrics() -> None:
    """Those of the tokens, 0 where masked; also for a token on the list, one off it, and under a soft-cap."""
    p = make_problem((2, 6))
    for options in HEADS.values():
        output = ours(p, *teacher_list(p, 3), **options)
        head = {k: v for k, v in options.items() if k != "chunk_size"}
        z = reference.logits(p.hidden, p.weight, p.bias, **head)
        counted = (p.mask != 0) & (p.tokens != -100)
        torch.testing.assert_close(output.logprobs, reference.logprobs(z, p.tokens).where(counted, 0.0))
        exact = reference.top_k_kl(z, *teacher_list(p, 3))[counted]
        torch.testing.assert_close(output.metrics["top_k_kl_mean"], exact.mean())
        torch.testing.assert_close(output.metrics["top_k_kl_max"], exact.max())


def test_nothing_left_outside_the_list() -> None:
    """Every unlisted token forbidden: no tail, and no 0 / 0."""
    p = make_problem((3,))._replace(mask=None, tokens=torch.tensor([0, 1, 2]))
    ids = torch.tensor([[0, 1, 2]]).repeat(3, 1)
    bias = p.bias.clone()
    bias[3:] = -torch.inf
    p = p._replace(bias=bias).leaves()
    for direction in DIRECTIONS:
        q = torch.log_softmax(torch.randn(3, 3, dtype=torch.float64), -1)
        ours(p, ids, q, direction=direction).loss.backward()
    assert p.hidden.grad.isfinite().all()


def test_a_masked_row_needs_no_list() -> None:
    p = make_problem((4,))._replace(
        mask=torch.tensor([1.0, 0.0, 1.0, 1.0]).double(), tokens=torch.zeros(4, dtype=torch.int64)
    )
    ids, logprobs = teacher_list(p, 3)
    expected = ours(p, ids, logprobs).loss
    ids[1] = -1
    torch.testing.assert_close(ours(p, ids, logprobs).loss, expected)
    torch.testing.assert_close(ours(p, ids, logprobs, skip_zero_rows=False).loss, expected)
