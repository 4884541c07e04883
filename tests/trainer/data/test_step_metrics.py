"""What batches measured, put together to the metrics of a step."""

from __future__ import annotations

import pytest
import torch

from fastkl.trainer.data.step_metrics import PolicyMetrics

# Of each batch: its share of the tokens, and what its loss measured.
BATCHES = [
    (0.5, {"jsd_mean": 1.0, "jsd_max": 3.0, "top1_agreement": 0.8}),
    (0.2, {"jsd_mean": 2.0, "jsd_max": 5.0, "rest_mass": 0.9}),
    (0.3, {"jsd_mean": 4.0, "jsd_max": 4.0, "rest_mass": 0.4}),
]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mean_is_over_the_tokens_of_the_batches_that_have_it(processes: int) -> None:
    parts = [PolicyMetrics() for _ in range(processes)]
    for number, (share, measured) in enumerate(BATCHES):
        parts[number % processes].add({name: torch.tensor(value) for name, value in measured.items()}, share)
    assert PolicyMetrics.together(parts) == {
        "policy/jsd_mean": pytest.approx(2.1),
        "policy/jsd_max": 5.0,
        "policy/top1_agreement": pytest.approx(0.8),
        "policy/rest_mass": pytest.approx(0.6),
    }


def test_nothing_measured_is_no_metric() -> None:
    assert PolicyMetrics.together([PolicyMetrics()]) == {}
