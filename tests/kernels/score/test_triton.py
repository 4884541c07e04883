"""The Triton scoring kernels against float64, at least as accurate as eager PyTorch, and the same bits in any company.

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from accuracy import assert_as_accurate, largest
from devices import INTERPRETED, triton_device
from problem import generator
from row_cases import INF, LOWEST, Rows, edge, edges, finite, ramp
from row_contract import outside
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastkl import reference
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.score import triton as score_triton
from fastkl.kernels.score.triton import Head

DEVICE = triton_device()

# The interpreter multiplies bf16 wrongly.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if not INTERPRETED:
    DTYPES["bf16"] = torch.bfloat16
HEADS = {
    "plain": HeadOptions(),
    "scaled": HeadOptions(temperature=0.7, logit_scale=1.6),
    "capped": HeadOptions(temperature=0.7, logit_scale=1.6, softcap=2.5),
    "wide-cap": HeadOptions(softcap=1000.0),
}
FUNCTIONS = {"token_nll": 5, "reverse_kl": 2}  # with how many values
BLOCK = 64  # columns of a tile with float32 operands


class Case(NamedTuple):
    student: Head
    teacher: Head
    y: Tensor | None  # [n]

    def each(self, change: Callable[[Head], Head]) -> Case:
        return self._replace(student=change(self.student), teacher=change(self.teacher))

    def rows(self, rows: slice) -> Case:
        cut = self.each(lambda head: head._replace(hidden=head.hidden[rows]))
        return cut._replace(y=None if self.y is None else self.y[rows])

    def logits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """z of student and teacher [n, V]."""

        def logits(head: Head) -> Tensor:
            hidden, weight, bias = (None if t is None else t.to(dtype) for t in head[:3])
            own = head.options
            return reference.logits(hidden, weight, bias, own.temperature, own.logit_scale, own.softcap)

        return logits(self.student), logits(self.teacher)


def make_case(n: int, vocabulary: int, dim: int = 20, dtype: torch.dtype = torch.float32, bias: bool = True) -> Case:
    g = generator(n)

    def head(d: int) -> Head:
        hidden, weight = torch.randn(n, d, generator=g), torch.randn(vocabulary, d, generator=g) * 2.0 / d**0.5
        biases = torch.randn(vocabulary, generator=g).to(dtype) if bias else None
        return Head(hidden.to(dtype), weight.to(dtype), biases, HeadOptions())

    return Case(head(dim), head(dim + 13), torch.randint(vocabulary, (n,), generator=g))


def on_device(head: Head) -> Head:
    tensors = (None if t is None else t.to(DEVICE) for t in head[:3])
    return Head(*tensors, head.options)


def score(name: str, student: Head, teacher: Head, y: Tensor | None, out: Tensor) -> Tensor:
    if name == "token_nll":
        score_triton.token_nll(student, y, out, out.shape[0] > 1)
    else:
        score_triton.reverse_kl(student, teacher, y, out)
    return out.cpu()


def run(name: str, case: Case, outputs: int | None = None) -> Tensor:
    """The values [K, n] of a scoring function."""
    student, teacher, y = case.each(on_device)
    out = torch.full((outputs or FUNCTIONS[name], len(student.hidden)), torch.nan, device=DEVICE)
    return score(name, student, teacher, None if y is None else y.to(DEVICE), out)


def expected(name: str, case: Case, dtype: torch.dtype) -> Tensor:
    z, z_t = case.logits(dtype)
    nll = z.new_zeros(z.shape[0]) if case.y is None else -reference.logprobs(z, case.y)
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(z_t, -1)
    p = log_p.exp()
    if name == "token_nll":
        assert case.y is not None
        m, target = z.amax(-1), z.gather(1, case.y[:, None]).squeeze(1)
        entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
        return torch.stack([nll, entropy, m, torch.logsumexp(z, -1) - m, m - target])
    return torch.stack([torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1), nll])


def comparable(values: Tensor) -> Tensor:
    """With the lse in place of its two parts. A row that is no distribution says so in the first two values alone."""
    if len(values) < 5:
        return values
    nll, entropy, m, above, gap = values
    return torch.stack([nll, entropy, *(t.masked_fill(entropy.isnan(), torch.nan) for t in (m + above, gap))])


def assert_accurate(name: str, case: Case) -> None:
    """Infinities and NaN where float64 has them; elsewhere the rule of the losses, on the same operands."""
    ours = comparable(run(name, case))
    peer, exact = (comparable(expected(name, case, dtype)) for dtype in (torch.float32, torch.float64))
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours.isinf(), exact.isinf())
    z, z_t = case.logits(torch.float64)
    size = max(1.0, largest(finite(z)), largest(finite(z_t)) if name == "reverse_kl" else 0.0)
    slack = 4 * torch.finfo(torch.float32).eps * max(size, largest(finite(exact)))
    assert_as_accurate(name, finite(ours), finite(peer), finite(exact), slack)


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a split, several splits, and groups of one row tile, with a small vocabulary."""
    monkeypatch.setattr(score_triton, "MAX_SPLITS", 3)
    monkeypatch.setattr(score_triton, "GROUP_BYTES", 1)


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor descriptors in the interpreter too."""
    if INTERPRETED:
        monkeypatch.setattr(score_triton, "target_of", lambda device: GPUTarget("cuda", 90, 32))


@pytest.mark.parametrize("vocabulary", [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 521])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_widths(name: str, vocabulary: int) -> None:
    assert_accurate(name, make_case(3, vocabulary))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 48, 61, 200])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_hidden_sizes(name: str, dim: int, dtype: torch.dtype) -> None:
    """Below a step of D, multiples of it, ragged; aligned and not."""
    assert_accurate(name, make_case(3, 150, dim, dtype, bias=False))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [8, 128])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("few_splits", "descriptors")
def test_descriptors(name: str, dim: int, dtype: torch.dtype) -> None:
    case = make_case(3, 900, dim, dtype)
    hidden, weight = (t[:, : dim + 8].contiguous() for t in case.teacher[:2])  # one step of D more than the student
    assert_accurate(name, case._replace(teacher=case.teacher._replace(hidden=hidden, weight=weight)))


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    ("name", "teacher"), [("token_nll", "plain"), ("reverse_kl", "plain"), ("reverse_kl", "capped")]
)
@pytest.mark.usefixtures("few_splits")
def test_heads(name: str, options: HeadOptions, teacher: str) -> None:
    case = make_case(5, 300)
    student, other = case.student._replace(options=options), case.teacher._replace(options=HEADS[teacher])
    assert_accurate(name, case._replace(student=student, teacher=other))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("few_splits")
def test_rows_of_several_tiles(name: str) -> None:
    assert_accurate(name, make_case(64 + 5, 200))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_large_vocabulary(name: str) -> None:
    """More tiles than splits."""
    assert_accurate(name, make_case(2, score_triton.MAX_SPLITS * BLOCK * 2 + 17, 4))


WIDE = 3 * BLOCK + 3  # two splits of two tiles
BLOCK_OF_SPLIT = 2 * BLOCK + 9  # within the second split
UP, TAIL = ramp(WIDE), torch.arange(WIDE) >= BLOCK_OF_SPLIT
# Student's row, teacher's row.
OWN_EDGES: dict[str, tuple[Tensor, Tensor]] = {
    "teacher forbids": (UP, edge(WIDE, (WIDE - 2, -INF))),
    "student at the lowest number": (UP.where(TAIL, LOWEST), UP),
    "student forbids, teacher at the lowest number": (UP.where(TAIL, -INF), UP.where(TAIL, LOWEST)),
    "nan": (edge(WIDE, (WIDE - 2, math.nan)), UP),
    "inf": (edge(WIDE, (WIDE - 2, INF)), UP),
    "all -inf": (edge(WIDE, fill=-INF), UP),
    "teacher nan": (UP, edge(WIDE, (WIDE - 2, math.nan))),
}
EDGES = edges(WIDE, BLOCK_OF_SPLIT) | {
    k: Rows(x[None], x_t[None], torch.tensor([3])) for k, (x, x_t) in OWN_EDGES.items()
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("few_splits")
def test_edges(name: str, case: str) -> None:
    """The rows come in as biases, for products of infinities with zeros are NaN."""
    (x,), (x_t,), y, *_ = EDGES[case]
    nothing = torch.zeros(1, 4), torch.zeros(WIDE, 4)
    assert_accurate(name, Case(*(Head(*nothing, bias, HeadOptions()) for bias in (x, x_t)), y))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("few_splits")
def test_undefined_rows_stay_alone(name: str) -> None:
    case = make_case(3, WIDE)
    for row, head in ((1, case.student), (2, case.teacher)):
        head.hidden[row, 3] = math.nan
    assert run(name, case)[0].isnan().tolist() == [False, True, name == "reverse_kl"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.usefixtures("few_splits")
def test_a_student_like_its_teacher(options: HeadOptions, dtype: torch.dtype) -> None:
    """Exactly 0, not nearly."""
    case = make_case(4, 300, dtype=dtype)
    case.student.bias[:77] = -INF
    student = case.student._replace(options=options)
    assert (run("reverse_kl", Case(student, student, case.y))[0] == 0).all()


@pytest.mark.parametrize("y", outside(WIDE))
def test_a_token_outside_the_vocabulary_is_nan(y: int) -> None:
    case = make_case(2, WIDE)._replace(y=torch.tensor([5, y]))
    nll, entropy, *_, gap = run("token_nll", case)
    kl, nll_too = run("reverse_kl", case)
    for values in (nll, nll_too, gap):
        assert values.isnan().tolist() == [False, True]
    for values in (entropy, kl):
        assert values.isfinite().all()


def test_without_entropy() -> None:
    case = make_case(3, WIDE)
    assert torch.equal(run("token_nll", case, outputs=1)[0], run("token_nll", case)[0])


def test_without_tokens() -> None:
    case = make_case(3, WIDE)
    values = run("reverse_kl", case._replace(y=None))
    assert torch.equal(values[0], run("reverse_kl", case)[0])
    assert (values[1] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows(name: str) -> None:
    assert run(name, make_case(0, 12)).shape == (FUNCTIONS[name], 0)


def in_eighths(head: Head) -> Head:
    return Head(*((tensor * 8).round() / 8 for tensor in head[:3]), head.options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("few_splits")
def test_same_bits_whatever_the_rows_around(name: str, dtype: torch.dtype) -> None:
    """Alone, elsewhere in its tile, in another tile, among more rows, and once again.

    The interpreter multiplies with NumPy, some of whose libraries add up a row in another order elsewhere in a matrix:
    there the logits are exact in any order.
    """
    case = make_case(140, 200, 48, dtype)
    if INTERPRETED:
        case = case.each(in_eighths)
    whole = run(name, case)
    assert torch.equal(whole, run(name, case))
    for rows in (slice(0, 1), slice(130, 131), slice(5, 70)):
        assert torch.equal(run(name, case.rows(rows)), whole[:, rows])


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 50257, 151936, 262144])
@pytest.mark.parametrize("block_n", [64, 128, 256])
def test_splits_cover_the_vocabulary(vocabulary: int, block_n: int) -> None:
    count, width = score_triton.splits(vocabulary, block_n)
    assert count <= score_triton.MAX_SPLITS
    assert width % block_n == 0
    assert (count - 1) * width < vocabulary <= count * width


@pytest.mark.parametrize("name", FUNCTIONS)
def test_strides(name: str) -> None:
    """Rows with a gap between them, results in the columns of a wider buffer, every second token."""
    case = make_case(3, WIDE)
    student, teacher, y = case.each(on_device)
    wide = torch.full((3, 50), 7.0, device=DEVICE)
    wide[:, :20] = student.hidden
    buffer = torch.full((6, FUNCTIONS[name] + 2), 7.0, device=DEVICE)
    out = buffer[::2, 1:-1].t()
    found = score(name, student._replace(hidden=wide[:, :20]), teacher, y.to(DEVICE).repeat_interleave(2)[::2], out)
    assert torch.equal(found, run(name, case))
    assert int((buffer == 7.0).sum()) == buffer.numel() - out.numel()


def test_what_is_refused() -> None:
    y, out = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.empty(2, 2, device=DEVICE)
    hidden, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(5, 8, device=DEVICE)
    good = Head(hidden, weight, None, HeadOptions())
    with pytest.raises(TypeError, match=r"of one dtype, .*not torch.float64 and torch.float64"):
        score_triton.token_nll(good._replace(hidden=hidden.double(), weight=weight.double()), y, out)
    with pytest.raises(TypeError, match=r"not torch.float32 and torch.bfloat16"):
        score_triton.token_nll(good._replace(weight=weight.bfloat16()), y, out)
    with pytest.raises(ValueError, match=r"row of the weight must lie side by side"):
        score_triton.token_nll(good._replace(weight=weight.t().contiguous().t()), y, out)
    with pytest.raises(ValueError, match=r"hidden size of at least 1, not 0: pass backend=.torch"):
        score_triton.token_nll(good._replace(hidden=hidden[:, :0], weight=weight[:, :0]), y, out)
    with pytest.raises(TypeError, match=r"torch.float32 for the student, torch.float16 for the teacher"):
        score_triton.reverse_kl(good, good._replace(hidden=hidden.half(), weight=weight.half()), y, out)
    with pytest.raises(ValueError, match=r"2 and 5 for the student, 2 and 4 for the teacher"):
        score_triton.reverse_kl(good, good._replace(weight=weight[:4]), y, out)
