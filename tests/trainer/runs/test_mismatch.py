"""Numbers of a step that come from all its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_settings import MINIMAL, config
from torch import Tensor

from fastkl.trainer.runs.guards.rules import Seen, facts_of, mismatch
from fastkl.trainer.runs.sharing.mismatch import mismatch_metrics


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=60), st.integers(0, 60))
def test_mismatch_is_that_of_all_batches_together(numbers: list[float], cut: int) -> None:
    values = torch.tensor(numbers)
    pairs = torch.stack([values, torch.zeros_like(values)], -1)
    found = mismatch_metrics([pairs[:cut], pairs[cut:]])
    sizes = values.double().abs()
    assert found["sampler_mismatch/mean_abs"] == pytest.approx(sizes.mean().item(), abs=1e-6)
    assert found["sampler_mismatch/p95_abs"] == pytest.approx(sizes.quantile(0.95).item(), abs=1e-6)
    assert len(found) == 4  # so few tokens say nothing of a slope


def test_no_step_has_too_many_tokens_for_its_mismatch() -> None:
    far, near = torch.zeros(2**24, 2), torch.tensor([[1.0, 0.0]]).expand(2**21, 2)
    assert mismatch_metrics([far, near])["sampler_mismatch/p95_abs"] == 1


def test_slope_and_missing_are_those_of_plain_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = -torch.rand(500, generator=generator) * 3
    theirs = 0.9 * ours - 0.1 + 0.02 * torch.randn(500, generator=generator)
    found = mismatch_metrics([torch.stack([ours, theirs], -1)[part] for part in (slice(200), slice(200, 500))])
    x, y = ours.double().numpy(), (theirs.double() - ours.double()).numpy()
    slope, offset = np.polyfit(x, y, 1)
    bread = np.linalg.inv(np.stack([x, np.ones(500)]) @ np.stack([x, np.ones(500)]).T)
    rows = np.stack([x, np.ones(500)]) * (y - slope * x - offset)
    assert found["sampler_mismatch/slope"] == pytest.approx(slope, rel=1e-9)
    assert found["sampler_mismatch/slope_se"] == pytest.approx(math.sqrt((bread @ (rows @ rows.T) @ bread)[0, 0]))
    assert found["sampler_mismatch/missing"] == pytest.approx(1 - np.exp(-y).mean(), rel=1e-9)
    assert found["sampler_mismatch/missing_se"] == pytest.approx(np.exp(-y).std() / math.sqrt(500), rel=1e-6)


def _top_p(logits: Tensor, share: float) -> Tensor:
    ordered, places = logits.log_softmax(-1).sort(descending=True)
    cut = ordered.exp().cumsum(-1) - ordered.exp() >= share
    return torch.empty_like(logits).scatter(-1, places, ordered.masked_fill(cut, -torch.inf))


def _noisy(logits: Tensor) -> Tensor:
    return logits + 0.05 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))


SAMPLERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "as-the-trainer": (lambda logits: logits, ""),
    "noise": (_noisy, ""),
    "bfloat16": (lambda logits: logits.bfloat16().float(), ""),
    "temperature-1.1": (lambda logits: logits / 1.1, "flatter"),
    "temperature-0.9": (lambda logits: logits / 0.9, "sharper"),
    "noise-and-temperature-1.1": (lambda logits: _noisy(logits) / 1.1, "flatter"),
    "top-p-0.9": (lambda logits: _top_p(logits, 0.9), "does not draw"),
    "top-p-0.95": (lambda logits: _top_p(_noisy(logits), 0.95), "does not draw"),
    "top-k-20": (
        lambda logits: logits.masked_fill(logits < logits.topk(20).values[:, -1:], -torch.inf),
        "does not draw",
    ),
}


@pytest.mark.parametrize(("change", "says"), SAMPLERS.values(), ids=SAMPLERS)
def test_settings_of_a_sampler_are_found_and_its_rounding_is_none(
    change: Callable[[Tensor], Tensor], says: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4000, 60, generator=generator) * torch.rand(4000, 1, generator=generator) * 6
    changed = change(logits).log_softmax(-1)
    tokens = torch.multinomial(changed.exp(), 1, generator=generator)
    pairs = torch.cat([each.gather(1, tokens) for each in (logits.log_softmax(-1), changed)], -1)
    settings = config("distill", MINIMAL["distill"])
    facts, row = facts_of(settings, [60], has_experts=False), mismatch_metrics([pairs])
    limits = type(settings.guards)(max_mismatch=1.0)  # by the KL alone, a temperature would be found here
    text = mismatch(Seen([row], [], facts, limits))
    assert (text is None) if not says else (says in str(text))
