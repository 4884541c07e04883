"""The sparse backward: what is drawn, what it claims of itself, and where it must equal the exact one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import Result, with_gradients
from loss_cases import each_need, fused, fused_output
from problem import generator, make_problem
from sparse_cases import (
    SEED,
    SPARSE,
    each_form,
    peaked_problem,
    relative_error,
    use_small_blocks,
    with_flat_rows,
)
from torch import Tensor

from fastkl.kernels.sparse import estimator as sparse_estimator
from fastkl.kernels.sparse import probabilities as sparse_probabilities
from fastkl.kernels.sparse import pytorch as sparse_pytorch
from fastkl.loss import Sparse


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


def assert_equal(a: Result, b: Result) -> None:
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=0)
    for field, gradient in a.gradients.items():
        torch.testing.assert_close(gradient, b.gradients[field], rtol=0, atol=0)


@each_need
@each_form
def test_same_seed_same_bits(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    p = peaked_problem()
    options = {**options, "backward": Sparse(SEED, error=0.1)}
    first = with_gradients(fused, name, p, needs, **options)
    assert_equal(first, with_gradients(fused, name, p, needs, **options))
    other = with_gradients(fused, name, p, needs, **{**options, "backward": Sparse(4, error=0.1)})
    torch.testing.assert_close(first.value, other.value, rtol=0, atol=0)
    for field in set(needs) - {"bias"}:
        assert not torch.equal(first.gradients[field], other.gradients[field])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error", [0.003, 0.03])
@pytest.mark.parametrize("name", ["policy_gradient", "reverse_kl"])
def test_error_is_the_one_asked_for(name: str, error: float, dtype: torch.dtype) -> None:
    """On peaked rows, within 1.5; what the metrics claim is within 1.5 of the truth as well."""
    p = peaked_problem(dtype=dtype)
    exact = with_gradients(fused, name, peaked_problem())
    found: dict[str, list[float]] = {"hidden": [], "weight": []}
    for seed in range(6):
        ours = with_gradients(fused, name, p, backward=Sparse(seed, error=error))
        for field, errors in found.items():
            errors.append(relative_error(ours.gradients[field], exact.gradients[field]))
    metrics = fused_output(name, p.leaves(), backward=Sparse(0, error=error)).metrics
    claimed, kept = float(metrics["grad_error"]), float(metrics["kept_fraction"])
    assert error / 1.2 < claimed < 1.2 * error
    assert 0 < kept < sparse_probabilities.BREAK_EVEN
    rounding = relative_error(with_gradients(fused, name, p).gradients["hidden"], exact.gradients["hidden"])
    mean = (sum(e**2 for e in found["hidden"]) / len(found["hidden"])) ** 0.5
    assert claimed / 1.5 < mean < 1.5 * (claimed + rounding)
    assert sum(found["weight"]) / len(found["weight"]) < 2.5 * (claimed + rounding)


def test_threshold_solves_for_the_variance() -> None:
    w = torch.rand(5000, generator=generator(0), dtype=torch.float64) ** 8
    for variance in (1e-9, 1e-4, 1.0, 1e6):
        tau = sparse_probabilities.threshold(w, torch.tensor(variance).double())
        found = (w * (tau - w).clamp(min=0)).sum()
        torch.testing.assert_close(found, torch.tensor(variance).double())
    assert sparse_probabilities.threshold(torch.zeros(7), torch.tensor(0.0)) == 0


@each_need
@each_form
def test_small_threshold_is_exact(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], needs: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sparse_probabilities, "BREAK_EVEN", 2.0)  # so that it is not exact for another reason
    p = peaked_problem(40)
    ours = with_gradients(fused, name, p, needs, backward=Sparse(SEED, threshold=1e-300), **options)
    exact = with_gradients(fused, name, p, needs, **options)
    for field, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, exact.gradients[field], rtol=1e-9, atol=1e-12)


def test_ids_outside_the_vocabulary_are_not_looked_up() -> None:
    """On a GPU that would end in a device-side assertion; their rows are NaN already, or masked."""
    found = sparse_probabilities.solve(Sparse(0), torch.ones(5), [torch.tensor([-100, 2, 5, 2**40])])
    assert found.w.isinf()[2]


def sampler(weight: Tensor, seed: int) -> sparse_pytorch.PyTorchColumnSampler:
    """With τ = 1: columns of one row are kept with probability |u|."""
    return sparse_pytorch.PyTorchColumnSampler(Sparse(seed, threshold=1.0), weight, summed=False)


def test_a_sample_of_all_columns_is_weighted_like_any_other() -> None:
    """Taken for the exact gradient it would be a bias: the mean over the draws would not be u."""
    u, slope = torch.full((1, 4), 0.45, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    weight, whole = torch.eye(4, dtype=torch.float64), 0
    for seed in range(100):
        columns = sampler(weight, seed).draw(u, slope, [])
        assert columns is not None
        whole += columns.ids.shape[0] == 4
        torch.testing.assert_close(columns.inverse, torch.full_like(columns.inverse, 1 / 0.45), rtol=1e-5, atol=0)
    assert whole > 0


def test_whether_there_is_room_does_not_depend_on_the_draw() -> None:
    """Else a block would be drawn again because many columns were, and the mean over the draws would be less than u."""
    n, vocabulary, probability = 3, 200, 0.3
    u = torch.full((n, vocabulary), probability / n**0.5, dtype=torch.float64)
    weight, slope = torch.zeros(vocabulary, 1, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    mean = n * vocabulary * probability
    drawn: list[int] = []
    for room, kept in ((0.99 * mean, 0), (1.01 * mean, 1), (2.01 * mean, 2)):
        for seed in range(8):
            own, estimates = sampler(weight, seed), sparse_estimator.Estimates(weight)
            estimates.room = room
            for start in (0, n, 2 * n):
                rows = slice(start, start + n)
                estimate = own.sample(u, slope, []).estimate(rows)
                assert estimate is not None
                drawn.append(estimate.gradient.numel())
                estimates.take(rows, estimate)
            assert len(estimates.kept) == kept
    assert min(drawn) < 0.9 * mean
    assert max(drawn) > 1.1 * mean


@each_need
@each_form
def test_flat_rows_are_exact(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    p = make_problem((40,), vocabulary=300, dim=8, spread=0.1)
    ours = with_gradients(fused, name, p, needs, **SPARSE, **options)
    exact = with_gradients(fused, name, p, needs, **options)
    for field, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, exact.gradients[field], rtol=1e-9, atol=1e-12)
    if name != "linear_logprobs":
        metrics = fused_output(name, p.leaves(needs), **SPARSE, **options).metrics
        assert (float(metrics["kept_fraction"]), float(metrics["grad_error"])) == (1.0, 0.0)


def test_flat_blocks_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is looked at in full, of the next ones a few rows; neighbours share a product."""
    looked_at: list[int] = []
    products: list[int] = []
    original, product = sparse_pytorch.PyTorchColumnSampler._column_squares, sparse_pytorch.add_weight_gradient

    def counted(self: sparse_pytorch.PyTorchColumnSampler, gradient: Tensor, slope: Tensor) -> Tensor:
        looked_at.append(gradient.shape[0])
        return original(self, gradient, slope)

    def multiplied(accumulator: Tensor, gradient: Tensor, *others: Any, **options: Any) -> None:
        products.append(gradient.shape[0])
        product(accumulator, gradient, *others, **options)

    monkeypatch.setattr(sparse_pytorch.PyTorchColumnSampler, "_column_squares", counted)
    monkeypatch.setattr(sparse_pytorch, "add_weight_gradient", multiplied)
    p = with_flat_rows(peaked_problem(96), slice(16, 64))
    with_gradients(fused, "policy_gradient", p, **SPARSE)
    assert looked_at == [16, 16, 2, 2, 2, 16, 16]
    assert products == [16, 48, 16, 16]


@each_form
def test_chunks_of_whole_blocks_draw_the_same_sample(name: str, options: dict[str, Any]) -> None:
    p, options = peaked_problem(80), {**options, "backward": Sparse(SEED, error=0.1)}
    whole = with_gradients(fused, name, p, **options)
    for chunk_size in (16, 48):
        other = with_gradients(fused, name, p, chunk_size=chunk_size, **options)
        for field, gradient in whole.gradients.items():
            torch.testing.assert_close(other.gradients[field], gradient, rtol=1e-9, atol=1e-12)
    odd = with_gradients(fused, name, p, chunk_size=13, **options)  # another sample, but a sample
    assert not torch.equal(odd.gradients["hidden"], whole.gradients["hidden"])


@each_need
@each_form
@pytest.mark.parametrize("case", ["no-rows", "all-masked", "one-token-vocabulary", "one-row"])
def test_edges(case: str, name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    sizes = {"no-rows": (0, 11), "all-masked": (6, 11), "one-token-vocabulary": (6, 1), "one-row": (1, 50)}
    n, vocabulary = sizes[case]
    p = make_problem((n,), vocabulary)
    if case == "all-masked":
        p = p._replace(tokens=torch.full_like(p.tokens, -100))
    ours = with_gradients(fused, name, p, needs, **SPARSE, **options)
    exact = with_gradients(fused, name, p, needs, **options)
    torch.testing.assert_close(ours.value, exact.value)
    for field, gradient in ours.gradients.items():
        assert gradient.isfinite().all()
        if case != "one-row":
            torch.testing.assert_close(gradient, exact.gradients[field])


def test_nan_is_not_hidden() -> None:
    p = peaked_problem()
    p.hidden[5] = torch.nan
    gradients = with_gradients(fused, "policy_gradient", p, **SPARSE).gradients
    assert gradients["hidden"][5].isnan().all()
    assert gradients["weight"].isnan().any()


def test_rows_of_zero_weight_stay_bounded() -> None:
    """Rows that are computed but do not count share the columns of the others: û there must not overflow."""
    p = peaked_problem(dtype=torch.float32)
    mask = torch.ones(64)
    mask[::2] = 0.0
    p = p._replace(mask=mask)
    gradients = with_gradients(fused, "policy_gradient", p, **SPARSE, skip_zero_rows=False).gradients
    assert all(g.isfinite().all() for g in gradients.values())
    assert (gradients["hidden"][::2] == 0).all()


@each_need
def test_without_a_softcap_and_with_one(needs: tuple[str, ...]) -> None:
    p = peaked_problem()
    exact = with_gradients(fused, "policy_gradient", p, needs, softcap=9.0, temperature=0.8)
    ours = with_gradients(
        fused, "policy_gradient", p, needs, softcap=9.0, temperature=0.8, backward=Sparse(SEED, error=0.01)
    )
    for field, gradient in ours.gradients.items():
        assert relative_error(gradient, exact.gradients[field]) < 0.03
