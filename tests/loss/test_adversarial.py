"""Data that breaks losses: degenerate logits, odd shapes, nothing to do, strange strides, garbage in masked rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import Result, assert_results_as_accurate, assert_same, with_gradients
from loss_cases import (
    DIVERGENCES,
    LISTS,
    LOSSES,
    REDUCED,
    WAYS,
    each_loss,
    each_way,
    eager,
    frozen_or_all,
    fused,
    fused_output,
    teacher_list,
)
from masked_rows import GARBAGE, clean_and_dirty, masked_problem
from problem import Problem, make_problem
from torch import Tensor

from fastkl.kernels.options import DIRECTIONS, TAILS
from fastkl.loss import Sparse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def logits_problem(z: Tensor, dtype: torch.dtype) -> Problem:
    """A problem whose logits are exactly `z` [N, V] (the weight is the identity), with the teacher's near them."""
    n, vocabulary = z.shape
    p = make_problem((n,), vocabulary, vocabulary, dtype=dtype)
    identity = torch.eye(vocabulary, dtype=dtype)
    p = p._replace(hidden=z.to(dtype), weight=identity, bias=None, mask=None, tokens=p.tokens.clamp(min=0))
    exact = eager("linear_logprobs", p.double()).float()
    own = p._replace(sampler_logprobs=(exact + 0.2).clamp(max=0.0), teacher_logprobs=exact - 0.3)
    return own._replace(teacher_hidden=(z * 0.9).to(dtype), teacher_weight=identity, teacher_bias=None)


def one_hot(n: int = 5, vocabulary: int = 13) -> Tensor:
    """Margins of 200: every other probability underflows in float32."""
    return 200.0 * torch.eye(vocabulary)[torch.arange(n) * 2 % vocabulary]


LOGITS = {
    "one-hot": one_hot(),
    "flat": torch.zeros(5, 13),
    "flat-and-far-down": torch.full((5, 13), -300.0),
    "all-below-minus-100": -150.0 + torch.randn(5, 13, generator=torch.Generator().manual_seed(0)),
    "plus-minus-1e4": 1e4 * torch.tensor([1.0, -1.0]).repeat(5, 7)[:, :13],
    "one-at-1e4": 1e4 * torch.eye(13)[:5],
    "ties-at-the-top": one_hot() + one_hot().roll(1, 1),
    "one-row": torch.linspace(-3, 3, 13)[None],
    "vocabulary-of-one": torch.full((3, 1), 5.0),  # a certain token: log-prob 0, no gradient
}


@each_dtype
@pytest.mark.parametrize("z", LOGITS.values(), ids=LOGITS)
@each_way
def test_extreme_logits(name: str, z: Tensor, dtype: torch.dtype) -> None:
    p = logits_problem(z, dtype)
    results = [with_gradients(f, name, q) for f, q in ((fused, p), (eager, p), (eager, p.double()))]
    for tensor in (results[0].value, *results[0].gradients.values()):
        assert tensor.isfinite().all()
    assert_results_as_accurate(*results, p)


@pytest.mark.parametrize("shift", [1e4, -1e4, 0.0], ids=["up", "down", "none"])
def test_large_common_shift_costs_no_digits(shift: float) -> None:
    """Logits of 1e4 + k/8 are exact in float32: so must be the log-probs, whose own size is 1."""
    z = shift + torch.arange(13.0).repeat(4, 1) / 8
    p = logits_problem(z, torch.float32)
    exact = eager("linear_logprobs", p.double())
    for q in (p, p.leaves(("hidden",))):  # scored, and with a gradient
        torch.testing.assert_close(fused("linear_logprobs", q).detach().double(), exact, rtol=3e-7, atol=0)


# 127 and 1009 are primes; 50257 is GPT-2's and odd; 2 the smallest with a choice. Neither knows of the number of rows.
@pytest.mark.parametrize(("vocabulary", "n"), [(2, 1), (2, 3), (127, 3), (1009, 1), (50257, 3)])
@each_way
def test_odd_vocabularies(name: str, vocabulary: int, n: int) -> None:
    p = make_problem((n,), vocabulary, dim=3)._replace(mask=None)
    p = p._replace(tokens=torch.tensor([vocabulary - 1, 0, vocabulary // 2])[:n])
    assert_same(with_gradients(fused, name, p), with_gradients(eager, name, p))


NOTHING: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "mean": {},
    "mean-of-others": {"normalizer": 12.0},
    "mean-of-nobody": {"normalizer": torch.tensor(0)},
    "none": {"reduction": "none"},
}
# linear_logprobs has no reduction. Of the others each one with each: it is the reduction that divides by nothing.
EMPTY_CALLS = [
    pytest.param(name, options, id=f"{name}-{key}")
    for name in WAYS
    for key, options in NOTHING.items()
    if name in REDUCED or not options
]


def assert_nothing(name: str, p: Problem, needs: tuple[str, ...], **options: Any) -> None:
    """Loss 0, connected to the graph; gradients 0; metrics and log-probs finite."""
    output = fused_output(name, p, **options)
    assert all(m.dim() == 0 and m.isfinite() for m in output.metrics.values())
    assert (output.logprobs == 0).all()
    result = with_gradients(fused, name, p, needs, **options)
    assert (result.value == 0).all()
    assert result.gradients.keys() == set(needs)
    for gradient in result.gradients.values():
        assert (gradient == 0).all()


@frozen_or_all
@pytest.mark.parametrize(("name", "reduction"), EMPTY_CALLS)
def test_no_tokens(name: str, reduction: dict[str, Any], needs: tuple[str, ...]) -> None:
    for lead in ((0,), (2, 0), (0, 3)):
        assert_nothing(name, make_problem(lead, dtype=torch.float32), needs, **reduction)


# What leaves rows out has done so before anything is reduced: the forms of a mask go with one reduction.
EMPTY_MASKS = [
    pytest.param(*call.values, why, id=f"{call.id}-{why}")
    for call in EMPTY_CALLS
    for why in ("bool-mask", "weight-mask", "ignored", "no-skip")
    if why in ("ignored", "no-skip") or not call.values[1]
]


@frozen_or_all
@pytest.mark.parametrize(("name", "reduction", "why"), EMPTY_MASKS)
def test_all_masked(name: str, reduction: dict[str, Any], why: str, needs: tuple[str, ...]) -> None:
    p, options = make_problem(dtype=torch.float32), dict(reduction)
    if name == "linear_logprobs" or why in ("ignored", "no-skip"):  # linear_logprobs has no mask
        p = p._replace(tokens=torch.full_like(p.tokens, -100))
    else:
        p = p._replace(mask=torch.zeros(p.tokens.shape, dtype=torch.bool if why == "bool-mask" else torch.float32))
    if why == "no-skip":
        options["skip_zero_rows"] = False
    else:  # rows that take no part may hold anything
        p = p._replace(hidden=torch.full_like(p.hidden, torch.nan), advantages=torch.full_like(p.advantages, torch.nan))
    assert_nothing(name, p, needs, **options)


@each_loss
def test_minus_inf_bias_equals_smaller_vocabulary(name: str) -> None:
    """Forbidden ids: the same as a head without them, and no gradient for their rows."""
    p, allowed = make_problem(vocabulary=11), torch.tensor([0, 1, 2, 4, 5, 7, 8, 9, 10])
    forbid = torch.zeros(11, dtype=torch.float64).index_fill(0, torch.tensor([3, 6]), -torch.inf)
    p = p._replace(tokens=allowed[p.tokens % 9].where(p.tokens != -100, -100))
    small = p._replace(
        tokens=torch.searchsorted(allowed, p.tokens).where(p.tokens != -100, -100),
        **{f: getattr(p, f)[allowed] for f in ("weight", "bias", "teacher_weight", "teacher_bias")},
    )
    own = {"label_smoothing": 0.0} if name == "cross_entropy" else {}  # smoothing wants every id, forbidden or not
    ours = with_gradients(fused, name, p._replace(bias=p.bias + forbid, teacher_bias=p.teacher_bias + forbid), **own)
    for field in ("weight", "bias"):
        assert (ours.gradients[field][[3, 6]] == 0).all()
        ours.gradients[field] = ours.gradients[field][allowed]
    assert_same(ours, with_gradients(fused, name, small, **own))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_sampled_token_of_probability_zero(dtype: torch.dtype, reduction: str) -> None:
    """ℓ = −inf: the ratio is 0, and so are the loss and the gradient of that token, not NaN."""
    p = make_problem(dtype=dtype)._replace(mask=None, tokens=torch.tensor([3, 1, 3, 0, 2, 1]))
    p = p._replace(bias=p.bias.index_fill(0, torch.tensor(3), -torch.inf))
    ours, *others = (
        with_gradients(f, "policy_gradient", q, reduction=reduction)
        for f, q in ((fused, p), (eager, p), (eager, p.double()))
    )
    assert_results_as_accurate(ours, *others, p)


@each_dtype
@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"chunk_size": 2}], ids=["temperature", "chunks"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_identical_student_and_teacher(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    p = make_problem((7,), 37, dtype=dtype)._replace(mask=None)
    p = p._replace(**{f"teacher_{f}": getattr(p, f) for f in ("hidden", "weight", "bias")})
    result = with_gradients(fused, name, p, reduction="none", **options)
    assert (result.value == 0).all()
    for gradient in result.gradients.values():
        assert (gradient == 0).all()


def stored_transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def sliced(t: Tensor) -> Tensor:
    return torch.stack([torch.full_like(t, torch.nan), t], dim=-1)[..., 1]


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [stored_transposed, sliced, expanded])
@pytest.mark.parametrize("field", ["hidden", "weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("name", ["linear_logprobs", "policy_gradient", "entropy", "top_k", "reverse_kl"])
def test_non_contiguous(name: str, dtype: torch.dtype, field: str, layout: Any) -> None:
    """Views as inputs: read through their strides, and gradients in the shape of the view."""
    p = make_problem(dtype=dtype)
    views = {f: layout(getattr(p, f)) for f in (field, f"teacher_{field}")}
    dense = p._replace(**{f: v.contiguous() for f, v in views.items()})
    needs = ("hidden", "weight")
    expected = with_gradients(fused, name, dense, needs, chunk_size=4)
    tensors = {f: views.get(f, getattr(p, f)).detach().requires_grad_() for f in needs}
    assert not tensors[field].is_contiguous()
    value = fused(name, p._replace(**{**views, **tensors}), chunk_size=4)
    upstream = torch.linspace(-1, 2, 6, dtype=value.dtype) if value.dim() else None
    gradients = torch.autograd.grad(value, list(tensors.values()), upstream)
    torch.testing.assert_close(value, expected.value)
    for f, gradient in zip(needs, gradients, strict=True):
        torch.testing.assert_close(gradient, expected.gradients[f])


skip_or_not = pytest.mark.parametrize("skip", [True, False], ids=["skip", "no-skip"])
# Every loss, and the options that change what is done with its rows.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOSSES},
    **{f"{name}-none": (name, {"reduction": "none"}) for name in LOSSES if name != "linear_logprobs"},
    **{f"top_k-{d}-{t}": ("top_k", {"direction": d, "tail": t}) for d in DIRECTIONS for t in TAILS},
    "sequence": ("policy_gradient", {"ratio": "sequence", "reduction": "sequence_mean"}),
    "discount": ("sampled_reverse_kl", {"discount": 0.5}),
    "softcap": ("reverse_kl", {"softcap": 3.0, "chunk_size": 3}),
    "sparse": ("linear_logprobs", {"backward": Sparse(0, threshold=1.0)}),
    "sparse-sampled_tail": ("sampled_tail", {"backward": Sparse(0, threshold=1.0), "hard_coef": 0.5}),
    "sparse-reverse_kl": ("reverse_kl", {"backward": Sparse(0, threshold=1.0)}),
}
forms = pytest.mark.parametrize("form", FORMS)


@skip_or_not
@frozen_or_all
@forms
def test_garbage_stays_where_it_is(form: str, needs: tuple[str, ...], skip: bool) -> None:
    """NaN or an infinity in masked rows of each argument: the loss, its gradients and metrics are those without it."""
    name, options = FORMS[form]
    p, out = masked_problem()
    options = options | {"skip_zero_rows": skip}
    if name == "linear_logprobs":  # it has no mask
        p = p._replace(tokens=p.tokens.where(~out, -100))
    without: dict[tuple[str, ...], tuple[Result, Any]] = {}  # by what is beside the problem
    for value in GARBAGE if form in LOSSES else GARBAGE[:1]:
        for argument, (clean, own), (dirty, other) in clean_and_dirty(name, p, out, value):
            if tuple(own) not in without:
                without[tuple(own)] = (
                    with_gradients(fused, name, clean, needs, **options, **own),
                    fused_output(name, clean, **options, **own).metrics,
                )
            expected, metrics = without[tuple(own)]
            assert expected.value.isfinite().all()
            try:
                assert_same(with_gradients(fused, name, dirty, needs, **options, **other), expected)
                assert fused_output(name, dirty, **options, **other).metrics == metrics
            except AssertionError as error:
                raise AssertionError(f"{value} in {argument}: {error}") from error


@skip_or_not
@frozen_or_all
@forms
def test_infinite_in_every_row_and_all_masked(form: str, needs: tuple[str, ...], skip: bool) -> None:
    """Ids that one side alone can emit, certain ones, lists of all ids: the loss is 0, and so are the gradients."""
    name, options = FORMS[form]
    p = make_problem(vocabulary=6)
    forbidden = torch.tensor([-torch.inf, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    p = p._replace(tokens=torch.full_like(p.tokens, -100))
    certain = torch.full_like(forbidden, -torch.inf).index_fill(0, torch.tensor(0), 0.0)
    for side in ({"bias": forbidden}, {"teacher_bias": forbidden}, {"bias": forbidden.roll(1)}, {"bias": certain}):
        own = {"k": 6, "teacher_logprobs": teacher_list(p, 6)[1] - 0.1} if name in LISTS else {}
        result = with_gradients(fused, name, p._replace(**side), needs, **options, **own, skip_zero_rows=skip)
        for tensor in (result.value, *result.gradients.values()):
            assert (tensor == 0).all()


def test_a_function_as_teacher() -> None:
    p, out = masked_problem()
    (_, (clean, own), (dirty, other)) = list(clean_and_dirty("reverse_kl", p, out, torch.nan))[2]
    logits = other["teacher_logits"].flatten(0, -2)
    found = with_gradients(fused, "reverse_kl", dirty, teacher_logits=lambda rows: logits[rows], skip_zero_rows=False)
    assert_same(found, with_gradients(fused, "reverse_kl", clean, **own))
