"""A head in pieces with backend="triton": what several processes compute from their rows is right as one's own is.

The processes run on a CPU in Triton's interpreter (test_interpreted.py). A GPU has no room for several of them here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pieces
import pytest
import torch
from accuracy import assert_as_accurate, largest
from devices import INTERPRETED
from groups import in_group
from loss_cases import HEADS, NEEDS
from pieces import TOKEN_STATS, Case, everything, merged, of_processes

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the processes of a group are on a CPU")

TWO, THREE, PADDED = (6, 5), (5, 2, 4), (6, 5, 2)
CLASSES = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 1.0, 0.0, 1.0, 3.0, 1.0, 1.0])
CAPPED = HEADS["all-chunked"]
PLAIN = {"label_smoothing": 0.0, "z_loss": 0.01}
NONE = {"reduction": "none"}
CASES = {
    key: case._replace(options={"backend": "triton", **case.options}, dtype=torch.float32)
    for key, case in {
        "logprobs": Case("linear_logprobs", {}, TWO),
        "logprobs-frozen": Case("linear_logprobs", CAPPED, THREE, NEEDS["frozen-head"]),
        "policy": Case("policy_gradient", {}, THREE),
        "policy-capped": Case("policy_gradient", {**CAPPED, **NONE}, TWO),
        "policy-one-has-none": Case("policy_gradient", {}, (0, 11)),
        "policy-forbidden": Case("policy_gradient", {}, THREE, change=pieces.forbidden_on_the_second),
        "policy-large": Case("policy_gradient", {}, TWO, change=pieces.large_logits),
        "policy-poisoned": Case("policy_gradient", {}, TWO, change=pieces.poisoned),
        "policy-values": Case("policy_gradient", {}, TWO, ()),
        "epilogue": Case("policy_gradient", {"backend": "epilogue"}, TWO),
        "entropy": Case("entropy", {}, THREE),
        "entropy-forbidden": Case("entropy", CAPPED, THREE, change=pieces.one_forbidden),
        "stats": Case(TOKEN_STATS, {"vocab_size": 10}, PADDED),
        "cross-entropy": Case("cross_entropy", PLAIN, THREE),
        "cross-entropy-classes": Case("cross_entropy", {**PLAIN, "class_weight": CLASSES, "softcap": 2.5}, TWO),
        "top-k": Case("top_k", {}, THREE),
        "top-k-hard": Case("top_k", {**CAPPED, "hard_coef": 0.5}, TWO),
        "top-k-one-has-none": Case("top_k", {"direction": "forward"}, (11, 0)),
        "sampled-tail": Case("sampled_tail", {}, THREE),
        "sampled-tail-forbidden": Case("sampled_tail", {}, THREE, change=pieces.forbidden_on_the_second),
    }.items()
}


@cache
def results() -> list[dict[str, Any]]:
    return in_group(of_processes, CASES, count=3)


@pytest.mark.parametrize("key", CASES)
def test_as_accurate(key: str) -> None:
    """Against what the whole head gives in PyTorch in float32, and the truth."""
    case = CASES[key]
    parts = [result[key] for result in results()[: len(case.sizes)]]
    assert all(isinstance(part, dict) for part in parts), parts
    p, found, options = case.problem(), merged(parts), {**case.options, "backend": "torch"}
    peer, exact = everything(case, p, **options), everything(case, p.double(), **options)
    assert found.keys() == exact.keys()
    assert {f"gradient {name}" for name in case.needs} <= found.keys()
    for name in found:
        ours, theirs, truth = (one[name].double() for one in (found, peer, exact))
        finite = truth.isfinite()
        assert torch.equal(ours.isfinite(), finite), name
        ours, theirs, truth = (one.where(finite, 0.0) for one in (ours, theirs, truth))
        assert_as_accurate(name, ours, theirs, truth, slack=2e-6 * max(1.0, largest(truth)))
