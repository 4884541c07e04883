"""redistributed_advantages against the reference; what no teacher can do to an advantage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problem import generator
from property_settings import PROPERTY
from torch import Tensor

from fastkl import loss, reference


def case(shape: tuple[int, ...], seed: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages of both signs and 0, and log-probs as far apart as `scale` nats."""
    g = generator(seed)
    advantages = torch.randn(shape, generator=g, dtype=torch.float64) * torch.randint(2, shape, generator=g)
    sampler, teacher = (-torch.rand(shape, generator=g, dtype=torch.float64) * scale for _ in range(2))
    return advantages, sampler, teacher


@PROPERTY
@given(
    st.integers(0, 2**31),
    st.sampled_from([(0,), (1,), (7,), (2, 5), (2, 0)]),
    st.floats(0, 1),
    st.floats(0, 0.99),
    st.sampled_from([0.1, 3.0, 300.0]),
)
def test_equals_reference_and_flips_no_sign(
    seed: int, shape: tuple[int, ...], share: float, clip: float, scale: float
) -> None:
    advantages, sampler, teacher = case(shape, seed, scale)
    ours = loss.redistributed_advantages(advantages, sampler, teacher, share=share, clip=clip)
    wanted = reference.redistributed_advantages(advantages, sampler, teacher, share, clip)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.sign(), advantages.sign())
    factor = (ours / advantages)[advantages != 0]
    assert ((factor >= 1 - share * clip - 1e-12) & (factor <= 1 + share * clip + 1e-12)).all()


def test_what_the_teacher_likes_counts_more_or_less() -> None:
    """Likelier, as likely, less likely with the teacher: encouraged more to less, or discouraged less to more."""
    gap = torch.tensor([0.1, 0.0, -0.1])
    up = loss.redistributed_advantages(torch.ones(3), torch.full((3,), -2.0), gap - 2, share=0.5)
    assert up.tolist() == pytest.approx([0.5 + 0.5 * math.exp(0.1), 1.0, 0.5 + 0.5 * math.exp(-0.1)])
    down = loss.redistributed_advantages(-torch.ones(3), torch.full((3,), -2.0), gap - 2, share=0.5)
    assert down.tolist() == pytest.approx([-0.5 - 0.5 * math.exp(-0.1), -1.0, -0.5 - 0.5 * math.exp(0.1)])


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.0, "clip": 0.0}], ids=str)
def test_the_edges_leave_advantages_as_they_are(settings: dict[str, float]) -> None:
    advantages, sampler, teacher = case((3, 8), 1, 5.0)
    assert torch.equal(loss.redistributed_advantages(advantages, sampler, teacher, **settings), advantages)


def test_what_is_impossible_stays_finite() -> None:
    never, some = torch.full((4,), -torch.inf), torch.tensor([-1.0, -1.0, -torch.inf, -torch.inf])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = loss.redistributed_advantages(advantages, some, never, share=1.0, clip=0.2)
    torch.testing.assert_close(found, torch.tensor([0.8, -1.2, 1.0, -1.0]))
    for one, other in ((some, never), (never, some)):
        assert (loss.redistributed_advantages(torch.zeros(4), one, other, share=0.5) == 0).all()


@pytest.mark.parametrize("shape", [(3,), (3, 1)], ids=str)
def test_one_for_each_row(shape: tuple[int, ...]) -> None:
    """As a reward gives it, and as policy_gradient_loss takes it."""
    _, sampler, teacher = case((3, 8), 4, 2.0)
    rewards = torch.tensor([1.0, -0.5, 0.0])
    found = loss.redistributed_advantages(rewards.reshape(shape), sampler, teacher, share=0.5)
    wanted = loss.redistributed_advantages(rewards[:, None].expand(3, 8), sampler, teacher, share=0.5)
    assert torch.equal(found, wanted)


def test_masked_tokens_may_hold_anything() -> None:
    advantages, sampler, teacher = case((6,), 2, 3.0)
    mask = torch.tensor([True, False, True, True, False, False])
    wanted = loss.redistributed_advantages(advantages, sampler, teacher, share=0.7).where(mask, 0.0)
    for tensor in (advantages, sampler, teacher):
        tensor[~mask] = torch.nan
        assert torch.equal(loss.redistributed_advantages(advantages, sampler, teacher, mask, share=0.7), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_gradient(dtype: torch.dtype) -> None:
    given = [tensor.to(dtype).requires_grad_() for tensor in case((4,), 3, 2.0)]
    found = loss.redistributed_advantages(*given, share=0.5)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"share": 1.5}, r"share is 1.5; it must be in \[0, 1\]"),
        ({"share": torch.nan}, "share"),
        ({"clip": 1.0}, r"clip is 1.0; it must be in \[0, 1\)"),
        ({"clip": -0.1}, "clip is -0.1"),
        ({"teacher_logprobs": torch.zeros(3)}, r"teacher_logprobs is \[3\] but sampler_logprobs is \[2\]"),
        ({"mask": torch.ones(1, 2)}, r"mask is \[1, 2\] but sampler_logprobs is \[2\]"),
        ({"advantages": torch.zeros(3)}, r"advantages is \[3\] but sampler_logprobs is \[2\]"),
        ({"sampler_logprobs": torch.tensor([0.5, 0.0])}, r"sampler_logprobs holds 0.5"),
    ],
    ids=str,
)
def test_refused(changed: dict[str, object], error: str) -> None:
    given: dict[str, object] = dict.fromkeys(("advantages", "sampler_logprobs", "teacher_logprobs"), torch.zeros(2))
    with pytest.raises(ValueError, match=error):
        loss.redistributed_advantages(**{**given, "share": 0.5, **changed})  # type: ignore[arg-type]
