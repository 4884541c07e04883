"""The checks with the Triton kernels: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from devices import INTERPRETED, triton_device

from fastkl._check.kernels import checks
from fastkl._check.problem import Sizes, make_problem
from fastkl.kernels.rows import triton as rows

DEVICE = triton_device()
PROBLEM = make_problem(Sizes(2, 16, 4112))
FLOAT32 = list(checks(PROBLEM, torch.float32, DEVICE, "triton"))
# The interpreter multiplies bfloat16 wrongly.
SCORES = [
    check
    for dtype in (torch.float16, *[torch.bfloat16] * (not INTERPRETED))
    for check in checks(PROBLEM, dtype, DEVICE, "triton")
    if check.kernels[0].startswith("score.")
]


@pytest.mark.parametrize("check", FLOAT32 + SCORES, ids=lambda check: f"{check.kernels[0]}-{check.variant}")
def test_all_is_well(check):
    found = check.measure(check.run())
    assert {one.kernel for one in found} == {*check.kernels}
    assert [one for one in found if not one.ok] == []


def test_a_wrong_kernel_is_named(monkeypatch):
    original = rows.token_nll

    def wrong(logits, tokens, out, gradient):
        factor = original(logits, tokens, out, gradient)
        gradient[:, 4096:] *= 1.01  # the last block alone
        return factor

    monkeypatch.setattr(rows, "token_nll", wrong)
    check = next(check for check in FLOAT32 if check.kernels[0] == "rows.token_nll")
    assert [(one.kernel, one.quantity) for one in check.measure(check.run()) if not one.ok] == [
        ("rows.token_nll", "gradient")
    ]
