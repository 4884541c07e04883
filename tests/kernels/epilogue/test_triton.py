"""The logits product with the row pass in its epilogue: values and gradients against float64, whatever it starts from.

It runs on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from accuracy import assert_as_accurate, largest
from devices import INTERPRETED, triton_device
from problem import generator
from row_cases import INF, edge, edges, finite, ramp
from row_contract import outside
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastkl import reference
from fastkl.kernels.epilogue import triton as epilogue
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.score import triton as score
from fastkl.kernels.score.triton import Head

DEVICE = triton_device()
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BLOCK = 64  # columns of a tile
WIDE = 3 * BLOCK + 3  # two splits of two tiles
HEADS = {
    "plain": HeadOptions(),
    "scaled": HeadOptions(temperature=0.7, logit_scale=1.6),
    "capped": HeadOptions(temperature=0.7, logit_scale=1.6, softcap=2.5),
    "wide-cap": HeadOptions(softcap=1000.0),
}
UNIT = {FP32: 2**-23, BF16: 2**-7 if INTERPRETED else 2**-8, FP16: 2**-11}  # the interpreter cuts bf16 off
each_dtype = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)


class Case(NamedTuple):
    head: Head
    y: Tensor  # [n]
    logprobs: Tensor  # [n], where it starts from

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """z [n, V]; that they are infinite or not defined may be a bias's doing."""
        own = self.head.options
        hidden, weight, bias = (None if t is None else t.to(dtype) for t in self.head[:3])
        return reference.logits(hidden, weight, bias, own.temperature, own.logit_scale, own.softcap)


class Outcome(NamedTuple):
    nll: Tensor  # [n]
    gradient: Tensor  # [n, V], by the scaled scores


def make_case(
    n: int, vocabulary: int, dim: int = 20, options: HeadOptions = HEADS["plain"], dtype: torch.dtype = FP32
) -> Case:
    """Log-probs with a little noise, as of another kernel."""
    g = generator(n)
    tensors = torch.randn(n, dim, generator=g), torch.randn(vocabulary, dim, generator=g) * 2.0 / dim**0.5
    head = Head(*(t.to(dtype) for t in (*tensors, torch.randn(vocabulary, generator=g))), options)
    case = Case(head, torch.randint(vocabulary, (n,), generator=g), torch.zeros(n))
    logprobs = reference.logprobs(case.logits(), case.y) + 0.05 * torch.randn(n, generator=g, dtype=torch.float64)
    return case._replace(logprobs=logprobs.float())


def run(case: Case, dtype: torch.dtype = FP32) -> Outcome:
    n, vocabulary = case.head.hidden.shape[0], case.head.weight.shape[0]
    head = Head(*(None if t is None else t.to(DEVICE) for t in case.head[:3]), case.head.options)
    out = torch.full((1, n), torch.nan, device=DEVICE)
    u = torch.full((n, vocabulary + 64), 7.0, dtype=dtype, device=DEVICE)  # rows with a gap between them
    factor = epilogue.token_nll(head, case.y.to(DEVICE), case.logprobs.to(DEVICE), out, u[:, :vocabulary])
    written = -(-vocabulary // 64) * 64
    assert (u[:, written:] == 7.0).all()
    return Outcome(out[0].cpu(), (factor[:, None] * u[:, :vocabulary].float()).cpu())


def exact(case: Case, dtype: torch.dtype = torch.float64) -> Outcome:
    z, cap = case.logits(dtype), case.head.options.cap
    gradient = torch.softmax(z, -1)
    gradient[torch.arange(len(case.y)), case.y] -= 1.0
    return Outcome(-reference.logprobs(z, case.y), gradient if cap is None else gradient * (cap - z) * (cap + z) / cap)


def assert_accurate(case: Case, dtype: torch.dtype = FP32) -> None:
    """Values by the rule of the losses. A gradient's error is at most a few times that of rounding it to its dtype."""
    ours, peer, true = run(case, dtype), exact(case, FP32), exact(case)
    assert torch.equal(ours.nll.isnan(), true.nll.isnan())
    assert torch.equal(ours.nll.isinf(), true.nll.isinf())
    size = max(1.0, largest(finite(case.logits())))
    eps = torch.finfo(FP32).eps
    slack = 4 * eps * max(size, largest(finite(true.nll)))
    assert_as_accurate("nll", finite(ours.nll), finite(peer.nll), finite(true.nll), slack)
    defined = ~true.nll.isnan()
    for own, expected, float32 in zip(
        ours.gradient[defined], true.gradient[defined], peer.gradient[defined], strict=True
    ):
        underflow = UNIT[FP16] * 2**-12 if dtype == FP16 else 0.0
        allowed = 1.5 * UNIT[dtype] * expected.norm() + 4 * (float32 - expected).norm() + 8 * eps * size + underflow
        assert (own.double() - expected).norm() <= allowed
    assert ours.gradient[~defined].isnan().all()


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a split, several splits, and groups of one row tile, with a small vocabulary."""
    monkeypatch.setattr(score, "MAX_SPLITS", 3)
    monkeypatch.setattr(score, "GROUP_BYTES", 1)


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor descriptors in the interpreter too."""
    if INTERPRETED:
        for module in (score, epilogue):
            monkeypatch.setattr(module, "target_of", lambda device: GPUTarget("cuda", 90, 32))


@each_dtype
@pytest.mark.parametrize("vocabulary", [1, 2, BLOCK - 1, BLOCK, 521])
@pytest.mark.usefixtures("few_splits")
def test_widths(vocabulary: int, dtype: torch.dtype) -> None:
    assert_accurate(make_case(3, vocabulary), dtype)


@each_dtype
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_heads(options: HeadOptions, dtype: torch.dtype) -> None:
    assert_accurate(make_case(5, 150, options=options), dtype)


@pytest.mark.parametrize("operands", [FP32, FP16], ids=str)
@pytest.mark.parametrize("dim", [1, 48, 61])
def test_hidden_sizes(dim: int, operands: torch.dtype) -> None:
    assert_accurate(make_case(3, 150, dim, dtype=operands), operands)


@pytest.mark.parametrize("options", [HEADS["plain"], HEADS["capped"]], ids=["plain", "capped"])
@pytest.mark.usefixtures("few_splits", "descriptors")
def test_descriptors(options: HeadOptions) -> None:
    """An odd vocabulary in rows of whole vectors, and more rows than a tile has."""
    case = make_case(131, 269, 16, options, FP16)
    wide = torch.zeros(131, 320, dtype=FP16, device=DEVICE)
    out, head = torch.empty(1, 131, device=DEVICE), Head(*(t.to(DEVICE) for t in case.head[:3]), options)
    factor = epilogue.token_nll(head, case.y.to(DEVICE), case.logprobs.to(DEVICE), out, wide[:, :269])
    gradient, true = (factor[:, None] * wide[:, :269].float()).cpu(), exact(case).gradient
    assert (gradient - true).norm() <= 1.5 * UNIT[FP16] * true.norm()
    assert (wide[:, 269:] == 0).all()


WRONG = {
    "50 too high": 50.0,
    "50 too low": -50.0,
    "200 too low": -200.0,
    "3 too high": 3.0,
    "3 too low": -3.0,
    "-inf": -INF,
    "nan": math.nan,
    "inf": INF,
}


def started(case: Case, off: float) -> Case:
    """Row 2 starts from elsewhere."""
    logprobs = case.logprobs.clone()
    logprobs[2] += off
    return case._replace(logprobs=logprobs)


@each_dtype
@pytest.mark.parametrize("off", WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("few_splits")
def test_where_it_starts_from_does_not_matter(off: float, dtype: torch.dtype) -> None:
    assert_accurate(started(make_case(4, 200), off), dtype)


@pytest.mark.usefixtures("few_splits")
def test_rows_around_a_wrong_one_keep_their_bits() -> None:
    """In its tile and in another."""
    case = make_case(66, 200)
    before, after = (run(one, FP16) for one in (case, started(case, -200.0)))
    others = torch.arange(66) != 2
    assert torch.equal(before.nll[others], after.nll[others])
    assert torch.equal(before.gradient[others], after.gradient[others])


@each_dtype
def test_large_logits(dtype: torch.dtype) -> None:
    case = make_case(4, 150)
    case = case._replace(head=case.head._replace(hidden=case.head.hidden * 200.0, bias=case.head.bias * 200.0))
    for logprobs in (reference.logprobs(case.logits(), case.y).float(), case.logprobs):
        assert_accurate(case._replace(logprobs=logprobs), dtype)


@pytest.mark.slow
def test_a_flat_row_of_many_in_float16() -> None:
    """Its sum from the largest score is more than float16 holds."""
    v = 70000
    case = Case(
        Head(torch.zeros(1, 1), torch.zeros(v, 1), None, HeadOptions()), torch.tensor([7]), torch.tensor([300.0])
    )
    nll, gradient = run(case, FP16)
    assert abs(float(nll) - math.log(v)) < 1e-5
    assert torch.allclose(gradient[0, 7], torch.tensor(-1.0), rtol=1e-4)
    assert torch.allclose(
        gradient[0, 8:].double(), torch.tensor(1 / v, dtype=torch.float64), rtol=2**-6
    )  # of subnormals


@each_dtype
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 1 - 1e-6])
def test_the_entry_of_the_token(p: float, dtype: torch.dtype) -> None:
    """Right in itself, and the row sums to nothing, up to the rounding of the others."""
    x = torch.zeros(100)
    x[5] = math.log(p / (1 - p) * 99)
    case = Case(
        Head(torch.zeros(1, 1), torch.zeros(100, 1), x, HeadOptions()),
        torch.tensor([5]),
        torch.tensor([math.log(p) + 0.03]),
    )
    gradient, true = run(case, dtype).gradient[0], exact(case).gradient[0]
    assert abs(float(gradient[5] - true[5])) <= 2 * UNIT[dtype] * (1 - p) * max(p, 1e-3) + 1e-6
    assert abs(float(gradient.double().sum())) <= UNIT[dtype] * (1 - p) + 1e-6


EDGES = {
    **{name: (x[0], int(y)) for name, (x, _, y, *_) in edges(WIDE, 2 * BLOCK + 9).items() if y is not None},
    "nan": (edge(WIDE, (WIDE - 2, math.nan)), 3),
    "inf": (edge(WIDE, (WIDE - 2, INF)), 3),
    "its token inf": (edge(WIDE, (3, INF)), 3),
    "all -inf": (edge(WIDE, fill=-INF), 3),
    "lowest": (ramp(WIDE).where(torch.arange(WIDE) > 9, torch.finfo(FP32).min), 4),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.usefixtures("few_splits")
def test_edges(name: str) -> None:
    """The rows come in as biases, for products of infinities with zeros are NaN."""
    x, y = EDGES[name]
    for logprob in (-1.0, -INF):
        head = Head(torch.zeros(1, 4), torch.zeros(WIDE, 4), x, HeadOptions())
        assert_accurate(Case(head, torch.tensor([y]), torch.tensor([logprob])))


@pytest.mark.parametrize("y", outside(WIDE))
def test_a_token_outside_the_vocabulary_is_nan(y: int) -> None:
    case = make_case(2, WIDE)._replace(y=torch.tensor([5, y]))
    nll, gradient = run(case)
    assert nll.isnan().tolist() == [False, True]
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all()


def test_undefined_rows_stay_alone() -> None:
    case = make_case(3, WIDE)
    case.head.hidden[1, 3] = math.nan
    nll, gradient = run(case)
    assert (
        nll.isnan().tolist()
        == gradient.isnan().all(1).tolist()
        == gradient.isnan().any(1).tolist()
        == [False, True, False]
    )


@pytest.mark.usefixtures("few_splits")
def test_same_bits_whatever_the_rows_around() -> None:
    """With logits that are exact in any order, as the interpreter's NumPy needs."""
    case = make_case(70, 200, 48)
    head = Head(*((t * 8).round() / 8 for t in case.head[:3]), case.head.options)
    case = case._replace(head=head)
    whole = run(case)
    for rows in (slice(0, 1), slice(66, 67)):
        own = Case(head._replace(hidden=head.hidden[rows]), case.y[rows], case.logprobs[rows])
        for ours, expected in zip(run(own), whole, strict=True):
            assert torch.equal(ours, expected[rows])


def test_no_rows() -> None:
    assert run(make_case(0, 12)).gradient.shape == (0, 12)
