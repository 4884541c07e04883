"""The steps of the sparse backward in Triton against the plain ones given the same selection, and its sample by itself.

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import Result, with_gradients
from determinism import refused_non_determinism
from devices import INTERPRETED, triton_device
from loss_cases import frozen_or_all, fused, fused_output
from problem import TRAINABLE, generator
from row_cases import gap, laid_out
from sparse_cases import bias_over_noise, peaked_problem, relative_error, use_small_blocks
from torch import Tensor

from bench.commands.count import count
from fastkl.kernels import workspace
from fastkl.kernels.sparse import estimator as sparse_estimator
from fastkl.kernels.sparse import probabilities as sparse_probabilities
from fastkl.kernels.sparse import pytorch as sparse_pytorch
from fastkl.kernels.sparse import steps
from fastkl.kernels.sparse.steps import Selection
from fastkl.loss import Sparse

DEVICE = triton_device()
# The interpreter multiplies bf16 wrongly.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if not INTERPRETED:
    DTYPES["bf16"] = torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Rows, V, D, K: within a tile, ragged, a prime V over several tiles, one row, none kept, all kept.
SHAPES = [(5, 96, 16, 9), (130, 1009, 33, 200), (3, 4099, 20, 2500), (1, 521, 8, 70), (4, 300, 9, 0), (7, 65, 70, 65)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Selection]:
    """u [B, V], W [V, D], hidden [B, D], slopes [B] of which every third is 0, and K columns."""
    n, vocabulary, dim, count = shape
    g = generator(n)
    u, weight, hidden = (
        torch.randn(*size, generator=g).to(dtype) for size in ((n, vocabulary), (vocabulary, dim), (n, dim))
    )
    slope = torch.randn(n, generator=g)
    slope[2::3] = 0.0
    ids = torch.full((vocabulary,), -1, dtype=torch.int32)
    ids[:count] = torch.randperm(vocabulary, generator=g)[:count].sort().values
    inverse = torch.full((vocabulary,), math.nan)
    inverse[:count] = 1 + 3 * torch.rand(count, generator=g)
    columns = Selection(ids, inverse, torch.tensor([count], dtype=torch.int32), torch.tensor([0.5]))
    moved = Selection(*(t.to(DEVICE) for t in columns))
    return u.to(DEVICE), weight.to(DEVICE), hidden.to(DEVICE), slope.to(DEVICE), moved


@dtypes
@shapes
@pytest.mark.parametrize(("summed", "room"), [(False, True), (True, False)], ids=["room", "summed"])
def test_widths(shape: tuple[int, int, int, int], dtype: torch.dtype, summed: bool, room: bool) -> None:
    """All products of a block, against float64 on the û that the plain version makes of the same selection.

    Rows lie side by side, or between them is NaN, of which nothing is used.
    """
    u, weight, hidden, slope, columns = make(shape, dtype)
    u = laid_out(u) if room else u
    count, vocabulary = shape[3], shape[1]
    ids = columns.ids[:count].long()
    expected = (u.index_select(1, ids).float() * columns.inverse[:count]).to(dtype)
    before = u.double().sum(1)
    excess = steps.compact(u, columns, summed)
    assert torch.equal(u[:, :count], expected)
    end = -(-count // 64) * 64
    whole = u.as_strided((shape[0], u.stride(0)), u.stride())
    assert not whole[:, count : end if room else min(end, vocabulary)].any()
    assert whole[:, max(vocabulary, end) :].isnan().all()
    kept = expected.double()
    own = kept.sum(1) - (before if summed else 0.0)
    torch.testing.assert_close(excess.double(), own, rtol=1e-4, atol=1e-2 if summed else 1e-3)

    centre = sparse_estimator.centre(weight)
    found = steps.hidden_gradient(u, weight, columns, slope, excess, centre)
    exact = slope.double()[:, None] * (kept @ weight[ids].double() - excess.double()[:, None] * centre.double())
    near = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
    torch.testing.assert_close(found.double(), exact, rtol=near, atol=near * max(1.0, float(exact.abs().max())))

    accumulator = torch.ones(vocabulary, shape[2], device=DEVICE)
    scaled = (hidden * slope[:, None]).to(dtype)
    steps.add_to_weight_gradient(accumulator, u, scaled, columns)
    total = torch.ones_like(accumulator).double().index_add(0, ids, kept.t() @ scaled.double())
    torch.testing.assert_close(accumulator.double(), total, rtol=1e-5, atol=1e-4)


def test_a_column_major_accumulator() -> None:
    u, _, hidden, _, columns = make((5, 96, 16, 9), torch.float32)
    accumulators = torch.zeros(96, 16, device=DEVICE), torch.zeros(16, 96, device=DEVICE).t()
    for accumulator in accumulators:
        steps.add_to_weight_gradient(accumulator, u, hidden, columns)
    assert torch.equal(*accumulators)


@dtypes
@pytest.mark.parametrize("n", [1, 9, 128, 300])
def test_column_squares(dtype: torch.dtype, n: int) -> None:
    u = laid_out(torch.randn(n, 1103, generator=generator(n)).to(dtype).to(DEVICE))
    weights = torch.rand(n, generator=generator(1)).to(DEVICE)
    exact = (u.double().square() * weights.double()[:, None]).sum(0)
    torch.testing.assert_close(steps.column_squares(u, weights).double(), exact, rtol=1e-5, atol=1e-6)


def test_all_columns_stay_as_they_are() -> None:
    u = laid_out(torch.randn(3, 2100, generator=generator(0)).to(DEVICE))
    w = torch.rand(2100, generator=generator(1)).to(DEVICE)
    w[5], w[7] = torch.nan, 0.0
    columns = steps.select_columns(w, torch.tensor([-1.0], device=DEVICE), 0, 0)
    assert int(columns.kept) == 2100
    assert torch.equal(columns.ids, torch.arange(2100, dtype=torch.int32, device=DEVICE))
    assert (columns.inverse == 1).all()
    before = u.clone()
    assert not steps.compact(u, columns, True).any()
    assert torch.equal(u, before)
    assert torch.equal(gap(u).isnan().sum(1).cpu(), torch.full((3,), 64))  # zeros up to a multiple of 64
    assert (gap(u)[:, :12] == 0).all()


def select(w: Tensor, seed: int, block: int = 0) -> Tensor:
    columns = steps.select_columns(w, torch.ones(1, device=DEVICE), seed, block)
    ids = columns.ids[: int(columns.kept)].long()
    assert (ids.diff() > 0).all()
    torch.testing.assert_close(columns.inverse[: ids.shape[0]], (1 / w[ids]).clamp(min=1.0))
    return ids


def test_frequencies_are_the_probabilities() -> None:
    """Σ (count − S π)² / (S π (1 − π)) over V columns is χ² with about V degrees: within 5 of its deviations, sqrt(2 V)."""
    w = torch.linspace(0.02, 0.98, 3001, device=DEVICE)
    draws = 60
    counts = torch.zeros(3001, device=DEVICE)
    for seed in range(draws):
        counts[select(w, seed << 30)] += 1
    chi = ((counts - draws * w).square() / (draws * w * (1 - w))).sum()
    assert abs(float(chi) - 3001) < 5 * (2 * 3001) ** 0.5
    # Neighbours, and the same column of consecutive seeds and blocks, are independent: the share of agreements is known.
    flat = torch.full((20011,), 0.5, device=DEVICE)
    masks = []
    for seed, block in ((1, 0), (1, 1), (2, 0), (1 + 2**32, 0)):
        mask = torch.zeros(20011, dtype=torch.bool, device=DEVICE)
        mask[select(flat, seed, block)] = True
        masks.append(mask)
    pairs = [(masks[0], other) for other in masks[1:]] + [(masks[0][1:], masks[0][:-1])]
    for one, other in pairs:
        assert abs(float((one == other).float().mean()) - 0.5) < 5 * 0.5 / 20010**0.5


def test_certain_and_impossible_columns() -> None:
    w = torch.tensor([0.0, 1.0, math.inf, 2.0**-26, 0.0, 3.0], device=DEVICE)
    for seed in range(20):
        assert select(w, seed).tolist() == [1, 2, 5]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@frozen_or_all
@pytest.mark.parametrize("name", ["policy_gradient", "linear_logprobs", "reverse_kl"])
def test_losses(name: str, needs: tuple[str, ...]) -> None:
    """The same seed gives the same bits, another one another sample; the error is the one asked for."""
    p, metrics = peaked_problem(20, torch.float32, 2000).to(DEVICE), list[dict[str, Tensor]]()

    def recorded(*args: Any, **options: Any) -> Tensor:
        output = fused_output(*args, **options)
        metrics.append(output.metrics)
        return output.loss

    def sampled(seed: int) -> Result:
        return with_gradients(recorded, name, p, needs, backward=Sparse(seed, error=0.02), backend="triton")

    exact = with_gradients(fused, name, p, needs, backend="triton")
    first, again, other = (sampled(seed) for seed in (3, 3, 4))
    assert torch.equal(first.value, again.value)
    for field, gradient in first.gradients.items():
        assert torch.equal(gradient, again.gradients[field])
        assert relative_error(gradient, exact.gradients[field]) < 0.06
    assert not torch.equal(first.gradients["hidden"], other.gradients["hidden"])
    if name != "linear_logprobs":
        if "bias" in needs:
            torch.testing.assert_close(first.gradients["bias"], exact.gradients["bias"])
        assert 0 < float(metrics[0]["kept_fraction"]) < sparse_probabilities.BREAK_EVEN
        assert 0.02 / 1.2 < float(metrics[0]["grad_error"]) < 1.2 * 0.02


@pytest.mark.parametrize("backward", ["exact", Sparse(3, error=0.1)], ids=["exact", "sparse"])
@pytest.mark.parametrize("name", ["policy_gradient", "linear_logprobs", "entropy", "jsd", "top_k"])
def test_no_operator_is_non_deterministic(monkeypatch: pytest.MonkeyPatch, name: str, backward: Any) -> None:
    """Around the kernels. Nor does a result depend on memory that was not written: there it is NaN."""
    p = peaked_problem(20, torch.float32, 300).to(DEVICE)
    plain = with_gradients(fused, name, p, backward=backward, backend="triton")
    with refused_non_determinism(monkeypatch):
        found = with_gradients(fused, name, p, backward=backward, backend="triton")
    assert torch.equal(found.value, plain.value)
    for field, gradient in found.gradients.items():
        assert torch.equal(gradient, plain.gradients[field])


def test_flat_rows_are_exact() -> None:
    p = peaked_problem(20, torch.float32, 300)
    p = p._replace(hidden=0.01 * p.hidden, bias=None).to(DEVICE)
    exact = with_gradients(fused, "policy_gradient", p, ("hidden", "weight"), backend="triton")
    how = {"backward": Sparse(1), "backend": "triton"}
    ours = with_gradients(fused, "policy_gradient", p, ("hidden", "weight"), **how)
    for field, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, exact.gradients[field], rtol=1e-4, atol=1e-6)
    metrics = fused_output("policy_gradient", p.leaves(("hidden", "weight")), **how).metrics
    assert (float(metrics["kept_fraction"]), float(metrics["grad_error"])) == (1.0, 0.0)


def test_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_unbiased.py has it, with what Philox draws and the kernels multiply."""
    monkeypatch.setattr(sparse_probabilities, "BREAK_EVEN", 2.0)
    p = peaked_problem(16, torch.float32, 200).to(DEVICE)
    ratios = bias_over_noise("policy_gradient", TRAINABLE, p, seeds=24, backend="triton")
    assert len(ratios) == 2
    assert max(ratios) < 2.0, ratios


class Work:
    """What the kernels of a sample, and the products beside them, do from here on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flops = self.gemm_bytes = self.row_bytes = self.entries = 0
        self.patch = monkeypatch
        for name in (
            "column_squares",
            "count_columns",
            "list_columns",
            "compact",
            "hidden_gradient",
            "weight_gradient",
        ):
            self.spy_kernel(name)
        self.spy_product(workspace, "project")
        self.spy_product(sparse_pytorch, "add_weight_gradient")

    def spy_kernel(self, name: str) -> None:
        kernel, seen = getattr(steps, name + "_kernel"), getattr(self, name)

        class Spied:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(**arguments: Any) -> None:
                    kernel[grid](**arguments)
                    seen(**arguments)

                return launch

        self.patch.setattr(steps, name + "_kernel", Spied())

    def spy_product(self, module: Any, name: str) -> None:
        original = getattr(module, name)

        def spied(*args: Any, **options: Any) -> None:
            original(*args, **options)
            if name == "project":
                hidden, weight, _, _, out = args
                self.flops += 2 * hidden.shape[0] * weight.numel()
                self.gemm_bytes += hidden.nbytes + weight.nbytes + out.nbytes
            else:  # then `part` is read, and rows of the accumulator are read and written
                part, estimate, hidden, _ = args
                self.flops += 2 * estimate.numel() * hidden.shape[1]
                self.gemm_bytes += estimate.nbytes + hidden.nbytes + 4 * part.nbytes
                self.row_bytes += 2 * estimate.nbytes  # the copy that was kept

        self.patch.setattr(module, name, spied)

    def column_squares(self, u_ptr: Tensor, partials_ptr: Tensor, **_: Any) -> None:
        self.row_bytes += u_ptr.nbytes + 2 * partials_ptr.nbytes + partials_ptr[0].nbytes

    def count_columns(self, norms_ptr: Tensor, **_: Any) -> None:
        self.row_bytes += norms_ptr.nbytes

    def list_columns(self, norms_ptr: Tensor, counts_ptr: Tensor, **_: Any) -> None:
        self.row_bytes += norms_ptr.nbytes + 8 * int(counts_ptr.sum())

    def compact(self, u_ptr: Tensor, count_ptr: Tensor, **_: Any) -> None:
        kept = u_ptr[:, : int(count_ptr)]
        self.entries += kept.numel()
        self.row_bytes += u_ptr.nbytes + kept.nbytes

    def hidden_gradient(self, u_ptr: Tensor, w_ptr: Tensor, count_ptr: Tensor, out_ptr: Tensor, **_: Any) -> None:
        estimate, weight = u_ptr[:, : int(count_ptr)], w_ptr[: int(count_ptr)]
        self.flops += 2 * estimate.numel() * weight.shape[1]
        self.gemm_bytes += estimate.nbytes + weight.nbytes + out_ptr.nbytes

    def weight_gradient(
        self, u_ptr: Tensor, h_ptr: Tensor, count_ptr: Tensor, accumulator_ptr: Tensor, **_: Any
    ) -> None:
        estimate, sums = u_ptr[:, : int(count_ptr)], accumulator_ptr[: int(count_ptr)]
        self.flops += 2 * estimate.numel() * h_ptr.shape[1]
        self.gemm_bytes += estimate.nbytes + h_ptr.nbytes + 2 * sums.nbytes


@pytest.mark.parametrize("form", ["frozen", "trainable", "composed"])
def test_counted_work_is_what_is_done(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """`bench count` of the fraction that was kept; what the row functions and zeros take is not seen here."""
    n, d, vocabulary = shape = (32, 24, 1000)
    p = peaked_problem(n, torch.float32, vocabulary)._replace(bias=None, advantages=torch.ones(n)).to(DEVICE)
    p = p._replace(weight=2 * p.weight)  # peaked without the bias
    needs = ("hidden",) if form == "frozen" else ("hidden", "weight")
    name = "linear_logprobs" if form == "composed" else "policy_gradient"
    work = Work(monkeypatch)
    with_gradients(fused, name, p, needs, backward=Sparse(1, error=0.2), backend="triton")
    kept = work.entries / (n * vocabulary)
    assert 0 < kept < sparse_probabilities.BREAK_EVEN
    counted = count(form, shape, torch.float32, device=DEVICE, kept=kept)
    assert counted.flops == pytest.approx(work.flops, abs=2)
    assert counted.gemm_bytes == pytest.approx(work.gemm_bytes + 4 * vocabulary * d * (form != "frozen"), abs=4)
    exact = count("frozen", shape, torch.float32, device=DEVICE)
    assert counted.rows.bytes - exact.rows.bytes == pytest.approx(work.row_bytes, abs=4)


def test_nan_is_not_hidden() -> None:
    p = peaked_problem(32, torch.float32, 500).to(DEVICE)
    p.hidden[5] = torch.nan
    gradients = with_gradients(fused, "policy_gradient", p, backward=Sparse(1), backend="triton").gradients
    assert gradients["hidden"][5].isnan().all()
    assert gradients["weight"].isnan().any()
