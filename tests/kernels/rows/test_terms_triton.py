"""The Triton kernels of the entropy term and of top-k tails: as accurate against float64 as those in PyTorch.

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from devices import triton_device
from loss_cases import assert_as_accurate, generator, largest
from torch import Tensor

from fastkl.kernels.rows import pytorch as rows_torch
from fastkl.kernels.rows import triton as rows_triton
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.launch import launch_config
from fastkl.kernels.top_k import triton as tails_triton
from fastkl.kernels.top_k.formula import DIRECTIONS, TAILS, top_k

DEVICE = triton_device()

BLOCK = launch_config(1).block
WIDTHS = [5, 1009, BLOCK, BLOCK + 1, 2 * BLOCK + 17]
CAPS = {"plain": None, "capped": 3.0}
caps = pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)
widths = pytest.mark.parametrize("vocabulary", WIDTHS)


def rows(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ordinary rows, a flat one, a one-hot one, one far down, and one with forbidden tokens; and their tokens."""
    g = generator(0)
    x = 2.0 * torch.randn(6, vocabulary, generator=g)
    x[1] = 0.5
    x[2, 3] = 60.0
    x[3] -= 300.0
    x[4, :: vocabulary // 2] = -math.inf
    return x, torch.tensor([1, vocabulary - 1, 3, 0, 1, 2])


def entropy(
    module: ModuleType, x: Tensor, y: Tensor, cap: float | None, into: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    x = x.clone()
    out = torch.empty(4, len(x), dtype=x.dtype, device=x.device)
    logits = Logits(x, cap)
    module.token_nll_entropy(logits, y, out, None)
    gradient = x if into is None else torch.full_like(x, math.nan, dtype=into)
    weights = torch.linspace(-1.0, 2.0, 2 * len(x), dtype=x.dtype, device=x.device).reshape(2, -1)
    module.entropy_gradient(logits, y, out, weights, gradient)
    return out.cpu(), gradient.cpu()


def assert_accurate(what: str, found: list[tuple[Tensor, Tensor]], own: float = 0.0) -> None:
    """ours, PyTorch's and float64's (values, gradient)."""
    for name, ours, peer, exact in zip(("values", "gradient"), *found, strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours.isfinite(), finite), f"{what} {name}"
        slack = 4e-7 * max(1.0, largest(exact[finite])) + (own * largest(exact[finite]) if name == "gradient" else 0.0)
        assert_as_accurate(f"{what} {name}", ours[finite].float(), peer[finite], exact[finite], slack)


@caps
@widths
@pytest.mark.parametrize("into", [None, torch.bfloat16, torch.float16], ids=str)
def test_entropy(vocabulary: int, cap: float | None, into: torch.dtype | None) -> None:
    x, y = rows(vocabulary)
    x = x if cap is None else x / 4.0
    ours = entropy(rows_triton, x.to(DEVICE), y.to(DEVICE), cap, into)
    found = [ours, entropy(rows_torch, x, y, cap, None), entropy(rows_torch, x.double(), y, cap, None)]
    assert_accurate("entropy", found, 0.0 if into is None else torch.finfo(into).eps)


def tails(
    module: ModuleType, variant: str, x: Tensor, y: Tensor, ids: Tensor, q: Tensor, cap: float | None
) -> tuple[Tensor, Tensor]:
    x = x.clone()
    out, gradient = torch.empty(2, len(x), dtype=x.dtype, device=x.device), torch.full_like(x, math.nan)
    logits = Logits(x, cap, top_ids=ids, top_logprobs=q.to(x.dtype))
    top_k(variant, module, logits, y, out, gradient)
    return out.cpu(), gradient.cpu()


@caps
@widths
@pytest.mark.parametrize("variant", [f"{direction}-{tail}" for direction in DIRECTIONS for tail in TAILS])
def test_top_k(variant: str, vocabulary: int, cap: float | None) -> None:
    x, y = rows(vocabulary)
    x = (x if cap is None else x / 4.0).clamp(min=-50.0)
    teacher = x + torch.randn(x.shape, generator=generator(1))
    q, ids = torch.log_softmax(teacher, -1).topk(3)
    ids[2, 2] = -1
    ours = tails(tails_triton, variant, *(t.to(DEVICE) for t in (x, y, ids, q)), cap)
    found = [ours, *(tails(rows_torch, variant, z, y, ids, q, cap) for z in (x, x.double()))]
    assert_accurate(variant, found)


@caps
def test_a_list_of_everything_leaves_no_tail(cap: float | None) -> None:
    x = torch.randn(2, 7, generator=generator(0), dtype=torch.float32)
    ids = torch.arange(7).expand(2, 7).contiguous()
    q = torch.log_softmax(torch.randn(2, 7, generator=generator(1)).double(), -1)
    y = torch.tensor([0, 6])
    ours = tails(tails_triton, "forward-bucket", *(t.to(DEVICE) for t in (x, y, ids, q)), cap)
    assert_accurate("all", [ours, *(tails(rows_torch, "forward-bucket", z, y, ids, q, cap) for z in (x, x.double()))])


@pytest.mark.parametrize("y", [-1, 5000])
def test_a_token_outside_the_vocabulary_is_nan(y: int) -> None:
    x = torch.randn(2, 50, generator=generator(0)).to(DEVICE)
    values, gradient = entropy(rows_triton, x, torch.tensor([3, y], device=DEVICE), None, None)
    assert values[0].isnan().tolist() == [False, True]
    assert gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


def test_no_rows() -> None:
    x, y = torch.empty(0, 9, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    values, gradient = entropy(rows_triton, x, y, None, None)
    assert (values.numel(), gradient.numel()) == (0, 0)
    ids = torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    values, gradient = tails(tails_triton, "reverse-bucket", x, y, ids, ids.float(), None)
    assert (values.numel(), gradient.numel()) == (0, 0)
