"""What must hold for any data: invariances, signs, sums."""

from __future__ import annotations

from typing import Any

import torch
from accuracy import Result, assert_same, with_gradients
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import LOSSES, REDUCED, each_way, fused, fused_output, unreduced
from problem import TRAINABLE, Problem, make_problem
from property_settings import PROPERTY
from torch import Tensor

SEEDS = st.integers(0, 2**31)
NAMES = st.sampled_from(sorted(LOSSES))
# sampled_reverse_kl_loss with a discount looks at later tokens by design; these options keep rows apart.
PER_TOKEN = ("hidden", "tokens", "mask", "advantages", "sampler_logprobs", "teacher_logprobs", "teacher_hidden")


def summed(name: str, p: Problem) -> Tensor:
    return fused(name, p, **unreduced(name)).sum()


def take(p: Problem, index: Any) -> Problem:
    return p._replace(**{f: getattr(p, f)[index] for f in PER_TOKEN})


@PROPERTY
@given(SEEDS, NAMES, st.floats(0.1, 10.0), st.sampled_from([None, 4.0]))
def test_gradient_by_logits_sums_to_zero(seed: int, name: str, temperature: float, softcap: float | None) -> None:
    """Softmax does not see a common shift. With weight = identity the hidden states are the logits before the cap."""
    p = make_problem(vocabulary=9, dim=9, seed=seed)
    p = p._replace(weight=torch.eye(9, dtype=torch.float64), bias=None).sampled_under(temperature=temperature)
    gradient = with_gradients(fused, name, p, ("hidden",), temperature=temperature, softcap=softcap).gradients["hidden"]
    if softcap is not None:  # dz/dx = (1 − tanh²(x / cap)) / temperature
        gradient = gradient / (1 - torch.tanh(p.hidden / softcap).square())
    scale = max(1.0, float(gradient.abs().max()))
    assert float(gradient.sum(-1).abs().max()) < 1e-11 * scale


@PROPERTY
@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.sampled_from([0.01, 1.0, 30.0]))
def test_reverse_kl_is_not_negative(seed: int, dtype: torch.dtype, spread: float) -> None:
    p = make_problem((16,), 33, dtype=dtype, seed=seed, spread=spread)
    kl = fused("reverse_kl", p, reduction="none")
    rounding = 33 * torch.finfo(kl.dtype).eps * max(1.0, spread)
    assert float(kl.min()) >= -rounding


@PROPERTY
@given(SEEDS, NAMES, st.integers(1, 12), st.sampled_from([torch.float64, torch.bfloat16]), st.booleans())
def test_chunk_size_changes_nothing(seed: int, name: str, chunk_size: int, dtype: torch.dtype, skip: bool) -> None:
    p = make_problem((11,), vocabulary=13, dtype=dtype, seed=seed)
    whole, chunked = (
        with_gradients(fused, name, p, chunk_size=size, skip_zero_rows=skip) for size in (None, chunk_size)
    )
    if dtype == torch.float64:
        assert_same(chunked, whole)
    else:  # sums of another order may round to the neighbouring bf16
        torch.testing.assert_close(chunked.value, whole.value, rtol=1e-5, atol=1e-5)
        for field, gradient in chunked.gradients.items():
            bound = float(whole.gradients[field].abs().max()) * torch.finfo(dtype).eps
            torch.testing.assert_close(gradient, whole.gradients[field], rtol=0, atol=bound)


@PROPERTY
@given(SEEDS, NAMES)
def test_row_order_changes_nothing(seed: int, name: str) -> None:
    p = make_problem((9,), seed=seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    shuffled, plain = (with_gradients(summed, name, q) for q in (take(p, order), p))
    plain.gradients["hidden"] = plain.gradients["hidden"][order]
    assert_same(shuffled, plain)
    values = fused(name, p, **unreduced(name))[order]
    torch.testing.assert_close(fused(name, take(p, order), **unreduced(name)), values)


@PROPERTY
@given(SEEDS, st.sampled_from(REDUCED), st.integers(0, 9))
def test_micro_batches_with_a_global_normalizer(seed: int, name: str, cut: int) -> None:
    """Gradient accumulation: the parts' losses add up, whatever falls into which part (even nothing)."""
    p = make_problem((9,), seed=seed)
    total = float(p.mask[p.tokens != -100].sum())
    if total == 0:
        return
    whole = with_gradients(fused, name, p)
    parts = [with_gradients(fused, name, take(p, rows), normalizer=total) for rows in (slice(0, cut), slice(cut, 9))]
    joined = {f: parts[0].gradients[f] + parts[1].gradients[f] for f in ("weight", "bias")}
    joined["hidden"] = torch.cat([part.gradients["hidden"] for part in parts])
    assert_same(Result(parts[0].value + parts[1].value, joined), whole)


@PROPERTY
@given(SEEDS, NAMES, st.sampled_from([(), (1,), (3,), (2, 4), (2, 1, 3)]))
def test_leading_dimensions_are_kept(seed: int, name: str, lead: tuple[int, ...]) -> None:
    if name == "sampled_reverse_kl" and not lead:
        return
    p = make_problem(lead, seed=seed)
    value = fused(name, p, **unreduced(name))
    assert value.shape == lead
    flat = p._replace(**{f: getattr(p, f).reshape(-1, *getattr(p, f).shape[len(lead) :]) for f in PER_TOKEN})
    torch.testing.assert_close(value.reshape(-1), fused(name, flat, **unreduced(name)))
    output = fused_output(name, p)
    assert output.loss.shape == (() if name in REDUCED else lead)
    assert output.logprobs.shape == lead


@PROPERTY
@given(SEEDS, NAMES, st.integers(0, 7))
def test_a_token_does_not_see_its_neighbours(seed: int, name: str, one: int) -> None:
    """Same row, alone and in a batch: the sampler's log-prob and the trainer's must agree."""
    p = make_problem((8,), vocabulary=101, dim=16, dtype=torch.float32, seed=seed)
    batch = fused(name, p, **unreduced(name))[one]
    alone = fused(name, take(p, slice(one, one + 1)), **unreduced(name))[0]
    torch.testing.assert_close(alone, batch, rtol=1e-5, atol=1e-5)


@PROPERTY
@given(SEEDS, NAMES, st.floats(-50.0, 50.0))
def test_shift_of_the_bias_changes_nothing(seed: int, name: str, shift: float) -> None:
    p = make_problem(seed=seed)
    moved = p._replace(bias=p.bias + shift, teacher_bias=p.teacher_bias - shift)
    assert_same(with_gradients(fused, name, moved), with_gradients(fused, name, p), tolerance=1e-9)


@PROPERTY
@given(SEEDS, NAMES)
def test_same_call_same_bits(seed: int, name: str) -> None:
    p = make_problem((11,), dtype=torch.bfloat16, seed=seed)
    first, second = (with_gradients(fused, name, p, chunk_size=3) for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert all(torch.equal(first.gradients[f], second.gradients[f]) for f in TRAINABLE)


@PROPERTY
@given(SEEDS, NAMES)
def test_skipping_rows_changes_nothing(seed: int, name: str) -> None:
    """The synchronisation-free form gives the same numbers."""
    p = make_problem((9,), seed=seed)
    p = p._replace(advantages=p.advantages.where(p.advantages > -0.5, 0.0))  # rows for the forward pass only
    skipped, all_rows = (with_gradients(fused, name, p, skip_zero_rows=skip) for skip in (True, False))
    assert_same(skipped, all_rows)
    outputs = [fused_output(name, p, skip_zero_rows=skip) for skip in (True, False)]
    torch.testing.assert_close(outputs[0].logprobs, outputs[1].logprobs)
    torch.testing.assert_close(outputs[0].metrics, outputs[1].metrics)


@each_way
def test_inputs_are_left_alone(name: str) -> None:
    p = make_problem((9,))
    before = Problem(*[None if t is None else t.clone() for t in p])
    with_gradients(fused, name, p)
    fused(name, p.leaves()).sum().backward()
    for field, was, now in zip(p._fields, before, p, strict=True):
        assert torch.equal(was, now), field
