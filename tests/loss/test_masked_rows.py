"""Rows that take no part may hold anything, and may be skipped or computed: nothing of them reaches a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import LOSSES, assert_same, frozen_or_all, fused, fused_output, make_problem, with_gradients
from masked_rows import GARBAGE, clean_and_dirty, masked_problem

from fastkl.kernels.options import DIRECTIONS, TAILS
from fastkl.loss import Sparse

skip_or_not = pytest.mark.parametrize("skip", [True, False], ids=["skip", "no-skip"])
# Every loss, and the options that change what is done with its rows.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOSSES},
    **{f"{name}-none": (name, {"reduction": "none"}) for name in LOSSES if name != "linear_logprobs"},
    **{f"top_k-{d}-{t}": ("top_k", {"direction": d, "tail": t}) for d in DIRECTIONS for t in TAILS},
    "sequence": ("policy_gradient", {"ratio": "sequence", "reduction": "sequence_mean"}),
    "discount": ("sampled_reverse_kl", {"discount": 0.5}),
    "softcap": ("reverse_kl", {"softcap": 3.0, "chunk_size": 3}),
    "sparse": ("linear_logprobs", {"backward": Sparse(0, threshold=1.0)}),
    "sparse-reverse_kl": ("reverse_kl", {"backward": Sparse(0, threshold=1.0)}),
}
forms = pytest.mark.parametrize("form", FORMS)


@skip_or_not
@frozen_or_all
@forms
def test_garbage_stays_where_it_is(form: str, needs: tuple[str, ...], skip: bool) -> None:
    """NaN or an infinity in masked rows of each argument: the loss, its gradients and metrics are those without it."""
    name, options = FORMS[form]
    p, out = masked_problem()
    options = options | {"skip_zero_rows": skip}
    if name == "linear_logprobs":  # it has no mask
        p = p._replace(tokens=p.tokens.where(~out, -100))
    for value in GARBAGE:
        for argument, (clean, own), (dirty, other) in clean_and_dirty(name, p, out, value):
            expected = with_gradients(fused, name, clean, needs, **options, **own)
            found = with_gradients(fused, name, dirty, needs, **options, **other)
            assert expected.value.isfinite().all()
            try:
                assert_same(found, expected)
                metrics = [fused_output(name, q, **options, **o).metrics for q, o in ((clean, own), (dirty, other))]
                assert metrics[0] == metrics[1]
            except AssertionError as error:
                raise AssertionError(f"{value} in {argument}: {error}") from error


@skip_or_not
@frozen_or_all
@forms
def test_infinite_in_every_row_and_all_masked(form: str, needs: tuple[str, ...], skip: bool) -> None:
    """Ids that one side alone can emit, and certain ones: the loss is 0, and so are the gradients."""
    name, options = FORMS[form]
    p = make_problem(vocabulary=6)
    forbidden = torch.tensor([-torch.inf, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    p = p._replace(tokens=torch.full_like(p.tokens, -100))
    certain = torch.full_like(forbidden, -torch.inf).index_fill(0, torch.tensor(0), 0.0)
    for side in ({"bias": forbidden}, {"teacher_bias": forbidden}, {"bias": forbidden.roll(1)}, {"bias": certain}):
        own = {"k": 6} if name == "top_k" else {}
        result = with_gradients(fused, name, p._replace(**side), needs, **options, **own, skip_zero_rows=skip)
        for tensor in (result.value, *result.gradients.values()):
            assert (tensor == 0).all()


def test_a_function_as_teacher() -> None:
    p, out = masked_problem()
    (_, (clean, own), (dirty, other)) = list(clean_and_dirty("reverse_kl", p, out, torch.nan))[2]
    logits = other["teacher_logits"].flatten(0, -2)
    found = with_gradients(fused, "reverse_kl", dirty, teacher_logits=lambda rows: logits[rows], skip_zero_rows=False)
    assert_same(found, with_gradients(fused, "reverse_kl", clean, **own))
