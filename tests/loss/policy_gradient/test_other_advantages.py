"""Advantages beside the plain reverse KL: bounded by a power, past the teacher, centred. Their means by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problem import generator
from property_settings import PROPERTY
from torch import Tensor

from fastkl import loss, reference

POWERS = st.sampled_from([0.0, 1e-300, 1e-8, 0.1, 0.5, 1.0, 5.0, 60.0, 1000.0])
SEEDS = st.integers(0, 2**31)
INF = torch.inf


def logits(*shape: int, seed: int, spread: float = 2.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64) * spread


def mean_gradient(z: Tensor, advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """E[−A ∇ log p] [V] by the logits of a student, over all tokens; A [V] of their log-probs."""
    z = z.clone().requires_grad_()
    log_p = torch.log_softmax(z, -1)
    p = log_p.detach().exp()
    return torch.autograd.grad(-(p * advantages(log_p.detach()) * log_p).sum(), z)[0]


def gradient(value: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(value(z).sum(), z)[0]


@PROPERTY
@given(SEEDS, POWERS, st.sampled_from([1, 2, 13]), st.sampled_from([0.01, 2.0, 30.0]))
def test_the_mean_of_a_power_is_the_density_power_divergence(
    seed: int, power: float, vocabulary: int, spread: float
) -> None:
    z, z_teacher = logits(2, vocabulary, seed=seed, spread=spread)
    log_q = torch.log_softmax(z_teacher, -1)
    found = mean_gradient(z, lambda log_p: loss.reverse_kl_advantages(log_p, log_q, power=power))
    exact = gradient(lambda z: reference.density_power(z, z_teacher, power), z)
    # Powers near 0: the terms of the reference cancel, of a size of 1 / power each.
    if power < 1e-3:
        exact = gradient(lambda z: reference.reverse_kl(z, z_teacher), z)
    tolerance = 1e-12 if power < 1e-10 or power > 1e-3 else 1e-5
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@PROPERTY
@given(SEEDS, st.sampled_from([0.0, 0.4, 1.0, 1.25, 3.0]))
def test_the_mean_of_an_extrapolation_is_a_reverse_kl(seed: int, extrapolate: float) -> None:
    """To the teacher pushed away from the reference, over the whole vocabulary."""
    z, z_teacher, z_ref = logits(3, 9, seed=seed)
    log_q, log_r = torch.log_softmax(z_teacher, -1), torch.log_softmax(z_ref, -1)
    found = mean_gradient(z, lambda log_p: loss.extrapolated_advantages(log_p, log_q, log_r, extrapolate=extrapolate))
    goal = extrapolate * z_teacher + (1.0 - extrapolate) * z_ref
    exact = gradient(lambda z: reference.reverse_kl(z, goal), z)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_power_of_0_and_an_extrapolation_of_1_are_the_reverse_kl_bit_by_bit(dtype: torch.dtype) -> None:
    sampler, teacher, ref = (-torch.rand(3, 4, 9, generator=generator(0), dtype=torch.float64) * 9).to(dtype)
    sampler[0, 0], teacher[0, 1], ref[0, 2] = 0.0, -INF, -INF
    mask = torch.rand(4, 9, generator=generator(1)) < 0.8
    options = {"coef": 0.7, "discount": 0.5, "sequence_ids": torch.arange(9).expand(4, 9) // 4}
    plain = loss.reverse_kl_advantages(sampler, teacher, mask, **options)
    assert torch.equal(loss.reverse_kl_advantages(sampler, teacher, mask, power=0.0, **options), plain)
    assert torch.equal(loss.reverse_kl_advantages(sampler, teacher, mask, power=0, **options), plain)
    past = loss.extrapolated_advantages(sampler, teacher, ref, mask, extrapolate=1.0, **options)
    assert torch.equal(past, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [5e-324, 1e-200, 1e-40, 1e-12])
def test_tiny_powers_are_the_limit(power: float, dtype: torch.dtype) -> None:
    sampler = torch.tensor([0.0, -1e-6, -1.0, -20.0, -3.0, -1e-30]).to(dtype)
    teacher = torch.tensor([0.0, -1.0, -1.0 - 1e-6, -0.5, -80.0, 0.0]).to(dtype)
    bounded, plain = (loss.reverse_kl_advantages(sampler, teacher, power=p) for p in (power, 0.0))
    torch.testing.assert_close(bounded, plain, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("power", [1e-3, 0.5, 1.0, 5.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_power_bounds_the_advantage(power: float, dtype: torch.dtype) -> None:
    """Also of tokens that one side finds impossible, or both; near ones do not cancel."""
    near = 1e-5
    sampler = torch.tensor([0.0, -INF, -INF, -2.0, -1e4, -2.0, -2.0], dtype=dtype)
    teacher = torch.tensor([-INF, 0.0, -INF, -2.0, 0.0, -1e4, -2.0 - near], dtype=dtype)
    advantages = loss.reverse_kl_advantages(sampler, teacher, power=power)
    assert (advantages.abs() <= (1.0 + 1e-6) / power).all()
    p, q = sampler.double(), teacher.double()
    expected = torch.exp(power * q) * -torch.expm1(power * (p - q)) / power
    expected[:3] = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64) / power
    expected[5] = (torch.exp(power * q[5]) - torch.exp(power * p[5])) / power
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-10, atol=0.0)


@pytest.mark.parametrize("power", [0.5, 60.0, 1000.0])
def test_log_probs_that_rounding_puts_above_0_keep_the_bound(power: float) -> None:
    sampler, teacher = torch.tensor([0.009, -1.0, 0.009]), torch.tensor([-1.0, 0.009, 0.0])
    assert (loss.reverse_kl_advantages(sampler, teacher, power=power).abs() <= (1.0 + 1e-6) / power).all()


@pytest.mark.parametrize("mask", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_a_mask_changes_no_dtype_and_gets_no_gradient(mask: torch.dtype) -> None:
    weights = torch.tensor([[0.0, 1.0], [2.0, 1.0]]).to(mask).requires_grad_(mask.is_floating_point)
    sampler, teacher = -torch.rand(2, 2, 2, generator=generator(6))
    for found, wanted in (
        (loss.reverse_kl_advantages(s, t, m, baseline=teacher, discount=0.5), loss.centred_advantages(sampler, m))
        for s, t, m in ((sampler, teacher, weights), (sampler, teacher, weights.detach().float()))
    ):
        assert found.dtype == wanted.dtype == torch.float32
        assert not found.requires_grad
        assert not wanted.requires_grad


def test_what_a_reference_forbids() -> None:
    sampler, teacher, ref = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -INF]), torch.tensor([-INF, -1.0])
    found = [loss.extrapolated_advantages(sampler, teacher, ref, extrapolate=x) for x in (1.5, 0.5, 1.0, 0.0)]
    assert [one.tolist() for one in found] == [[INF, -INF], [-INF, -INF], [-1.0, -INF], [-INF, 0.0]]
    masked = loss.extrapolated_advantages(sampler, teacher, ref, torch.tensor([0, 0]), extrapolate=1.5)
    assert masked.tolist() == [0.0, 0.0]


def test_the_options_of_an_extrapolation_are_those_of_the_reverse_kl() -> None:
    """On the log-probs of the teacher that it comes to, where those are below 0."""
    sampler, teacher, ref, baseline = -1.0 - torch.rand(4, 3, 8, generator=generator(4), dtype=torch.float64)
    mask = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(4, (3, 8), generator=generator(5))]
    options = {
        "coef": 0.3,
        "discount": 0.9,
        "baseline": baseline,
        "sequence_ids": torch.arange(8).expand(3, 8) // 3,
    }
    found = loss.extrapolated_advantages(sampler, teacher, ref, mask, extrapolate=1.25, **options)
    goal = ref + 1.25 * (teacher - ref)
    torch.testing.assert_close(found, loss.reverse_kl_advantages(sampler, goal, mask, **options))


@pytest.mark.parametrize("packed", [False, True])
def test_centred_against_a_loop(packed: bool) -> None:
    advantages = logits(3, 7, seed=2)
    mask = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(4, (3, 7), generator=generator(3))].double()
    ids = torch.tensor([[4, 4, 1, 1, 1, 4, 4], [4, 9, 9, 9, 9, 9, 9], [0] * 7])  # 4 three times: not one sequence
    sequences = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 4, 4, 4, 4, 4, 4], [5] * 7])
    if not packed:
        sequences = torch.arange(3)[:, None].expand(3, 7)
    expected = torch.zeros(3, 7).double()
    weighted = advantages * mask
    for place in itertools.product(range(3), range(7)):
        others = sequences != sequences[place]
        expected[place] = mask[place] * (advantages[place] - weighted[others].sum() / mask[others].sum())
    dirty = weighted.where(mask != 0, torch.nan)
    ours = loss.centred_advantages(dirty, mask, sequence_ids=ids if packed else None)
    torch.testing.assert_close(ours, expected)
    assert loss.centred_advantages(dirty.float(), mask, sequence_ids=ids if packed else None).dtype == torch.float32


def test_a_sequence_without_others_is_left_as_it_is() -> None:
    one = logits(1, 5, seed=0)
    assert torch.equal(loss.centred_advantages(one), one)
    two, mask = logits(2, 5, seed=0), torch.tensor([[1.0], [0.0]]).expand(2, 5) * 0.1
    assert torch.equal(loss.centred_advantages(two, mask), two.where(mask != 0, 0.0))
    assert loss.centred_advantages(torch.zeros(2, 0)).shape == (2, 0)
    assert loss.centred_advantages(torch.ones(3, 2, 4)).abs().max() == 0
    with pytest.raises(ValueError, match=r"advantages is a single number, .* expected \[..., T\]"):
        loss.centred_advantages(torch.tensor(1.0))


def test_a_sequence_has_no_part_in_its_own_baseline() -> None:
    """Neither an infinity nor a size that rounds the others away."""
    others = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
    for large in (-INF, 2.0**100):
        found = loss.centred_advantages(torch.cat([torch.tensor([[large, 7.0]]), others]))
        assert found[0].tolist() == [large, 4.0]
    weights = torch.tensor([[1.0, 1.0], [1e-20, 1e-20]])
    torch.testing.assert_close(loss.centred_advantages(others * weights, weights)[0], torch.tensor([-3.5, -2.5]))


@pytest.mark.parametrize("power", [0.0, 2.0])
@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_centring_leaves_the_mean(discount: float, power: float) -> None:
    """All outcomes of two sequences of two tokens, the second of which depends on the first; the plain mean fails."""
    vocabulary = 3
    first, then = logits(2, 2, vocabulary, seed=0), logits(2, 2, vocabulary, vocabulary, seed=1)  # [side, sequence, …]
    leaves = [t[0].clone().requires_grad_() for t in (first, then)]
    outcomes = torch.tensor(list(itertools.product(range(vocabulary), repeat=4))).reshape(-1, 2, 2)
    rows = torch.arange(2)

    def logprobs(first: Tensor, then: Tensor) -> Tensor:
        """[outcomes, sequences, tokens]"""
        early = torch.log_softmax(first, -1)[rows, outcomes[..., 0]]
        late = torch.log_softmax(then, -1)[rows, outcomes[..., 0], outcomes[..., 1]]
        return torch.stack([early, late], -1)

    ours, theirs = logprobs(*leaves), logprobs(first[1], then[1])
    chance = ours.detach().sum((1, 2)).exp()
    plain = loss.reverse_kl_advantages(ours, theirs, discount=discount, power=power)
    centred = torch.stack([loss.centred_advantages(one) for one in plain])
    shrunk = plain - plain.mean((1, 2), keepdim=True)
    means = [
        torch.autograd.grad((chance * (a * ours).sum((1, 2))).sum(), leaves, retain_graph=True)
        for a in (plain, centred, shrunk)
    ]
    torch.testing.assert_close(means[1], means[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(means[2][0], means[0][0], rtol=0.1)


def test_the_loss_takes_a_power() -> None:
    g = generator(8)
    hidden, weight = torch.randn(2, 5, 4, generator=g), torch.randn(11, 4, generator=g)
    tokens, teacher = torch.randint(11, (2, 5), generator=g), -5.0 * torch.rand(2, 5, generator=g)
    sampler = loss.linear_logprobs(hidden, weight, tokens)
    advantages = loss.reverse_kl_advantages(sampler, teacher, power=0.5, discount=0.9)
    expected = loss.policy_gradient_loss(hidden, weight, tokens, advantages, sampler)
    found = loss.sampled_reverse_kl_loss(hidden, weight, tokens, teacher, sampler, power=0.5, discount=0.9)
    assert torch.equal(found.loss, expected.loss)
