"""reverse_kl_advantages against the recursion of the reference, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import packed_advantages
from problem import generator
from property_settings import PROPERTY
from torch import Tensor

from fastkl import loss, reference

DISCOUNTS = (0.0, 0.5, 1.0)
MASKS = {"float": torch.float64, "bool": torch.bool, "int": torch.int64}


def logprobs(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    sampler, teacher = (-torch.rand(shape, generator=g, dtype=torch.float64) * 4 for _ in range(2))
    return sampler, teacher


def masks(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    return weights[torch.randint(4, shape, generator=generator(seed + 1))].to(dtype)


def packs(shape: tuple[int, ...], seed: int) -> Tensor:
    """Ids that grow along the last dimension by 0 or 1: sequences of any length, of one token too."""
    return torch.randint(2, shape, generator=generator(seed + 2)).cumsum(-1)


@PROPERTY
@given(
    st.integers(0, 2**31),
    # 1, 2, 3, 8, 9: around the powers of two at which the doubling sum takes one more step.
    st.sampled_from([(0,), (1,), (2,), (3,), (8,), (9,), (33,), (2, 7), (3, 1), (2, 0), (2, 3, 5)]),
    st.sampled_from([*DISCOUNTS, 0.97]),
    st.sampled_from(sorted(MASKS)),
    st.booleans(),
    st.sampled_from([1.0, 0.3, -2.0]),
    st.sampled_from([0.0, 0.1, 1.0, 5.0]),
)
def test_equals_reference(
    seed: int, shape: tuple[int, ...], discount: float, mask_dtype: str, packed: bool, coef: float, power: float
) -> None:
    sampler, teacher = logprobs(shape, seed)
    mask, ids = masks(shape, seed, MASKS[mask_dtype]), packs(shape, seed) if packed else None
    options = {"coef": coef, "discount": discount, "power": power}
    ours = loss.reverse_kl_advantages(sampler, teacher, mask, sequence_ids=ids, **options)
    expected = packed_advantages(sampler, teacher, mask.double(), ids, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_without_mask_every_token_counts(discount: float) -> None:
    sampler, teacher = logprobs((2, 9), 0)
    ours = loss.reverse_kl_advantages(sampler, teacher, discount=discount)
    assert torch.equal(ours, loss.reverse_kl_advantages(sampler, teacher, torch.ones(2, 9), discount=discount))
    assert (ours != 0).all()


def test_sign_and_order() -> None:
    """A token that the teacher likes less than the sampler did is discouraged; the future pays for it, not the past."""
    sampler, teacher = torch.zeros(3), torch.tensor([0.0, -2.0, 0.0])
    assert loss.reverse_kl_advantages(sampler, teacher).tolist() == [0.0, -2.0, 0.0]
    assert loss.reverse_kl_advantages(sampler, teacher, discount=0.5).tolist() == [-1.0, -2.0, 0.0]
    assert loss.reverse_kl_advantages(sampler, teacher, discount=1.0, coef=0.5).tolist() == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize("discount", DISCOUNTS[1:])
def test_no_sum_crosses_a_boundary(discount: float) -> None:
    """One sequence packed between two others gets what it gets alone."""
    sampler, teacher = logprobs((12,), 3)
    ids = torch.tensor([7] * 3 + [2] * 5 + [9] * 4)  # ids need not be sorted
    packed = loss.reverse_kl_advantages(sampler, teacher, discount=discount, sequence_ids=ids)
    middle = slice(3, 8)
    alone = loss.reverse_kl_advantages(sampler[middle], teacher[middle], discount=discount)
    torch.testing.assert_close(packed[middle], alone)
    poisoned = teacher.clone()
    poisoned[8:] = -torch.inf  # a broken sequence stays the only broken one
    again = loss.reverse_kl_advantages(sampler, poisoned, discount=discount, sequence_ids=ids)
    assert torch.equal(again[:8], packed[:8])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["sampler", "teacher", "both"])
@pytest.mark.parametrize("discount", DISCOUNTS)
def test_masked_tokens_may_hold_anything(discount: float, where: str, garbage: float) -> None:
    sampler, teacher = logprobs((2, 8), 5)
    mask = masks((2, 8), 5, torch.float64)
    assert 0 < (mask == 0).sum() < 16
    clean = loss.reverse_kl_advantages(sampler, teacher, mask, discount=discount)
    spoil = {"sampler": (True, False), "teacher": (False, True), "both": (True, True)}[where]
    dirty = [
        t.where(mask != 0, garbage) if spoiled else t for t, spoiled in zip((sampler, teacher), spoil, strict=True)
    ]
    ours = loss.reverse_kl_advantages(*dirty, mask, discount=discount)
    assert torch.equal(ours, clean)
    assert (ours[mask == 0] == 0).all()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_dtype_and_detachment(dtypes: tuple[torch.dtype, torch.dtype], expected: torch.dtype) -> None:
    pairs = zip(logprobs((6,), 6), dtypes, strict=True)
    sampler, teacher = (t.to(dtype).requires_grad_() for t, dtype in pairs)
    ours = loss.reverse_kl_advantages(sampler, teacher, discount=0.5)
    assert ours.dtype == expected
    assert not ours.requires_grad
    difference = sampler.detach().double() - teacher.detach().double()
    exact = packed_advantages(difference, torch.zeros_like(difference), torch.ones(6), None, discount=0.5)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


def test_arguments_are_not_changed() -> None:
    sampler, teacher = logprobs((6,), 7)
    before = sampler.clone(), teacher.clone()
    loss.reverse_kl_advantages(sampler, teacher, discount=1.0)
    assert torch.equal(sampler, before[0])
    assert torch.equal(teacher, before[1])


def test_a_single_token_without_dimensions() -> None:
    one = loss.reverse_kl_advantages(torch.tensor(-1.0), torch.tensor(-3.0), coef=0.5, discount=0.9)
    assert one.shape == ()
    assert one.item() == -1.0


def test_only_a_tokens_own_baseline_is_taken_off() -> None:
    (sampler, teacher), mask = logprobs((2, 5), 0), masks((2, 5), 0, torch.float64)
    baseline, options = torch.rand(2, 5).double(), {"coef": 0.5, "discount": 0.8}
    plain = loss.reverse_kl_advantages(sampler, teacher, mask, **options)
    shifted = loss.reverse_kl_advantages(sampler, teacher, mask, baseline=baseline, **options)
    torch.testing.assert_close(shifted, (plain + 0.5 * mask * baseline).where(mask != 0, 0.0))


def test_a_baseline_lowers_the_variance_and_leaves_the_mean() -> None:
    """One draw's gradient by the logits, over 4000: its mean is the exact gradient of the reverse KL either way.

    8 states of a peaked student (0.8 nats); a teacher 5 nats away, as at the start of a run.
    """
    g, samples = generator(0), 4000
    hidden, weight, shift = (torch.randn(n, 12, generator=g, dtype=torch.float64) for n in (8, 60, 8))
    z, z_teacher = ((states @ (1.5 * weight).t()) for states in (hidden, hidden + shift))
    tokens = torch.multinomial(torch.softmax(z, -1), samples, replacement=True, generator=g).t()  # [samples, states]
    sampled, judged = (reference.logprobs(scores.expand(samples, -1, -1), tokens) for scores in (z, z_teacher))
    u = torch.nn.functional.one_hot(tokens, 60) - torch.softmax(z, -1)  # d log-prob / dz
    z.requires_grad_()
    kl = reference.reverse_kl(z, z_teacher)
    (exact,) = torch.autograd.grad(kl.sum(), z)
    variances = []
    for baseline in (None, kl.detach().expand_as(tokens)):
        draws = -loss.reverse_kl_advantages(sampled, judged, baseline=baseline)[..., None] * u
        variances.append(draws.var(0).sum())
        assert (draws.mean(0) - exact).norm() < 2.0 * (variances[-1] / samples).sqrt()
    assert variances[1] < 0.6 * variances[0]
