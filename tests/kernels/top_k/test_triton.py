"""The tails of top-k lists in Triton: as accurate against float64 as those in PyTorch.

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from devices import triton_device
from problem import generator
from row_cases import INF, Outcome, Rows, assert_same_bits, assert_terms_accurate, hard_rows, random_rows, run
from torch import Tensor

from fastkl.kernels.divergence.formula import HardTarget
from fastkl.kernels.options import DIRECTIONS, TAILS, SampledTail
from fastkl.kernels.rows import pytorch as rows_pytorch
from fastkl.kernels.rows.interface import Logits, TailTokens
from fastkl.kernels.rows.launch import row_config
from fastkl.kernels.top_k import triton as top_k_triton
from fastkl.kernels.top_k.formula import top_k

DEVICE = triton_device()
BLOCK = row_config(1).block_n
VARIANTS = [f"{direction}-{tail}" for direction in DIRECTIONS for tail in TAILS]
SAMPLED = SampledTail(0.8, 1.5)
caps = pytest.mark.parametrize("cap", [None, 3.0])


def run_on(
    module: ModuleType,
    variant: str,
    rows: Rows,
    ids: Tensor,
    q: Tensor,
    dtype: torch.dtype = torch.float32,
    hard: HardTarget | None = None,
    tail: Tensor | None = None,
) -> Outcome:
    def function(logits: Logits, y: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
        logits = logits._replace(top_ids=ids.to(out.device), top_logprobs=q.to(out.device, dtype))
        if tail is None:
            top_k(variant, module, logits, y, out, gradient, hard)
        else:
            logits = logits._replace(tail=TailTokens(*tail.to(out.device, dtype)))
            top_k(variant, module, logits, y, out, gradient, hard, SAMPLED)

    outputs = 2 + (hard is not None) + 4 * (tail is not None)
    return run(function, rows, dtype, outputs, DEVICE if module is top_k_triton else "cpu", apart=dtype)


def assert_right(
    variant: str, rows: Rows, ids: Tensor, q: Tensor, hard: HardTarget | None = None, tail: Tensor | None = None
) -> None:
    given = (variant, rows, ids, q)
    ours, peer = (run_on(module, *given, hard=hard, tail=tail) for module in (top_k_triton, rows_pytorch))
    assert_terms_accurate(ours, peer, run_on(rows_pytorch, *given, torch.float64, hard, tail))


@caps
@pytest.mark.parametrize("vocabulary", [5, 1009, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
@pytest.mark.parametrize("variant", VARIANTS)
def test_widths(variant: str, vocabulary: int, cap: float | None) -> None:
    rows = hard_rows(vocabulary, cap)
    x = rows.x.clamp(min=-50.0)
    q, ids = torch.log_softmax(x + torch.randn(x.shape, generator=generator(1)), -1).topk(3)
    ids[2, 2] = -1
    assert_right(variant, rows._replace(x=x), ids, q)


@caps
@pytest.mark.parametrize("power", [1.0, 2.5])
@pytest.mark.parametrize("vocabulary", [5, BLOCK + 1])
@pytest.mark.parametrize("variant", ["reverse-bucket", "forward-renormalise"])
def test_hard_targets(variant: str, vocabulary: int, power: float, cap: float | None) -> None:
    """Of tokens that are listed, that are not, and that a list of everything has."""
    rows = hard_rows(vocabulary, cap)
    x = rows.x.clamp(min=-50.0)
    q, ids = torch.log_softmax(x + torch.randn(x.shape, generator=generator(1)), -1).topk(3)
    ids[2, 2] = -1
    y = torch.where(torch.arange(6) % 2 == 0, ids[:, 0], rows.y)
    assert_right(variant, rows._replace(x=x, y=y), ids, q, HardTarget(0.7, power))


@caps
@pytest.mark.parametrize("hard", [None, HardTarget(0.7, 2.5)], ids=["", "hard"])
@pytest.mark.parametrize("vocabulary", [5, BLOCK + 1])
def test_sampled_tails(vocabulary: int, hard: HardTarget | None, cap: float | None) -> None:
    """Of tokens that are listed and that are not; far from the sampler, beyond the cap, next to certain."""
    rows = hard_rows(vocabulary, cap)
    x = rows.x.clamp(min=-50.0)
    q, ids = torch.log_softmax(x + torch.randn(x.shape, generator=generator(1)), -1).topk(3)
    ids[2, 2] = -1
    ids[2, :2] = torch.tensor([0, 1])  # not the token, which is next to certain
    y = torch.where(torch.arange(6) == 5, ids[:, 0], rows.y)
    tail = torch.tensor([[-1.0, -3.0, -0.1, -50.0, -2.0, -4.0], [-2.0, -1.0, -0.2, -40.0, -0.3, -9.0], [0.4] * 6])
    assert_right("reverse-bucket", rows._replace(x=x, y=y), ids, q, hard, tail)


@caps
@pytest.mark.parametrize("hard", [None, HardTarget(0.7, 2.5)], ids=["", "hard"])
@pytest.mark.parametrize("variant", ["reverse-bucket", "forward-renormalise"])
def test_biases(variant: str, hard: HardTarget | None, cap: float | None) -> None:
    """Of listed ids, of the token and of the tail; of a listed id +inf, where the cap makes a number of it."""
    rows = random_rows(3, BLOCK + 1)
    bias = torch.randn(BLOCK + 1, generator=generator(3))
    bias[1] = -INF
    rows = rows._replace(caps=(cap, None), biases=(bias, None), y=torch.tensor([7, BLOCK, 3]))
    q, ids = torch.log_softmax(rows.x + torch.randn(rows.x.shape, generator=generator(1)), -1).topk(3)
    ids[:, 0] = 7
    if cap is not None:
        bias[7] = INF
    ours, other = (run_on(top_k_triton, variant, r, ids, q, hard=hard) for r in (rows, rows.added()))
    assert_same_bits(ours, other)
    assert ours.values[0].isfinite().all()


@pytest.mark.parametrize("module", [top_k_triton, rows_pytorch], ids=["triton", "torch"])
def test_a_hard_target_outside_the_vocabulary_is_nan(module: ModuleType) -> None:
    rows = random_rows(3, 9)
    q, ids = torch.log_softmax(torch.randn(3, 9, generator=generator(1)).double(), -1).topk(3)
    tokens = torch.tensor([2, 9, -5])
    found = run_on(module, "reverse-bucket", rows._replace(y=tokens), ids, q, hard=HardTarget(0.7, 2.0))
    assert found.values[2].isnan().tolist() == [False, True, True]
    assert found.gradient.isnan().all(1).tolist() == found.gradient.isnan().any(1).tolist() == [False, True, True]


@caps
def test_a_list_of_everything_leaves_no_tail(cap: float | None) -> None:
    rows = random_rows(2, 7)._replace(y=torch.tensor([0, 6]), caps=(cap, None))
    q = torch.log_softmax(torch.randn(2, 7, generator=generator(1)).double(), -1)
    assert_right("forward-bucket", rows, torch.arange(7).repeat(2, 1), q)


@pytest.mark.parametrize("module", [top_k_triton, rows_pytorch], ids=["triton", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_outside_the_vocabulary_make_nan(variant: str, module: ModuleType) -> None:
    """Of their rows alone, and nothing is read there; a list without any id too, and of a token the log-prob."""
    rows = random_rows(6, 9)
    q, ids = torch.log_softmax(torch.randn(6, 9, generator=generator(1)).double(), -1).topk(3)
    plain = run_on(module, variant, rows, ids, q)
    ids[0, 0], ids[1, 2], ids[2], tokens = 9, 2**40, -1, rows.y.clone()
    tokens[3], tokens[4] = 9, -5
    found = run_on(module, variant, rows._replace(y=tokens), ids, q)
    assert found.values[0, :3].isnan().all()
    assert found.values[1, 3:5].isnan().all()
    assert found.gradient[:3].isnan().all()
    assert torch.equal(found.values[0, 3:], plain.values[0, 3:])
    assert torch.equal(found.values[1, 5], plain.values[1, 5])
    assert torch.equal(found.gradient[3:], plain.gradient[3:])


def test_no_rows() -> None:
    nothing = torch.empty(0, 2, dtype=torch.int64)
    found = run_on(top_k_triton, "reverse-bucket", random_rows(0, 9), nothing, nothing.float())
    assert [t.numel() for t in found] == [0, 0]
