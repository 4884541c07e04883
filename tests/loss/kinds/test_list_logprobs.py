"""Log-probs of lists of ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastkl.loss import linear_list_logprobs, linear_top_k

V, D = 50, 16


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab_size", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_they_are_those_of_the_logits(softcap: float | None, vocab_size: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((3, 7, D), (V, D), (V,)))
    ids = torch.stack([torch.randperm(40)[:6] for _ in range(21)]).reshape(3, 7, 6)
    ids[0, 1, 4:], ids[2, 3] = -1, -1
    options: dict[str, Any] = {"temperature": 0.7, "logit_scale": 1.5, "softcap": softcap, "vocab_size": vocab_size}
    logits = (hidden @ weight.t() + bias) * 1.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    whole = torch.log_softmax(logits[..., :vocab_size] / 0.7, -1)
    wanted = whole.gather(-1, ids.clamp(min=0)).where(ids >= 0, 0.0)
    found = linear_list_logprobs(hidden, weight, ids, bias=bias, chunk_size=4, **options)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted)
    top = linear_top_k(hidden, weight, 6, bias=bias, **options)
    assert torch.equal(linear_list_logprobs(hidden, weight, top.ids, bias=bias, **options), top.logprobs)


def test_no_rows_no_ids_and_ids_of_32_bits() -> None:
    weight = torch.randn(V, D)
    assert linear_list_logprobs(torch.ones(0, D), weight, torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
    assert linear_list_logprobs(torch.ones(2, D), weight, torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
    ids = torch.tensor([[1, -1]], dtype=torch.int32)
    assert torch.equal(
        linear_list_logprobs(torch.ones(1, D), weight, ids), linear_list_logprobs(torch.ones(1, D), weight, ids.long())
    )


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "id": ({"ids": torch.tensor([[1], [8]])}, ValueError, r"ids holds 8, outside the vocabulary \(0 … 7; −1 pads\)"),
    "below": ({"ids": torch.tensor([[1], [-2]])}, ValueError, r"ids holds -2, outside the vocabulary"),
    "padding": ({"vocab_size": 2}, ValueError, r"ids holds 2, outside the vocabulary \(0 … 1"),
    "shape": (
        {"ids": torch.tensor([1, 2])},
        ValueError,
        r"ids is \[2\] but hidden is \[2, 3\]: expected k entries per token",
    ),
    "rows": ({"ids": torch.tensor([[1]])}, ValueError, r"ids is \[1, 1\] but hidden is \[2, 3\]"),
    "dtype": ({"ids": torch.ones(2, 1)}, TypeError, r"ids is torch.float32; expected integers"),
    "list": ({"ids": [[1], [2]]}, TypeError, r"ids must be a tensor, not list"),
    "device": (
        {"ids": torch.ones(2, 1, dtype=torch.int64, device="meta")},
        ValueError,
        r"ids is on meta but hidden is on cpu",
    ),
    "option": ({"mask": None}, TypeError, r"unexpected keyword argument 'mask'"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"hidden": torch.ones(2, 3), "weight": torch.ones(8, 3), "ids": torch.tensor([[1], [2]]), **change}
    with pytest.raises(error, match=message):
        linear_list_logprobs(**arguments)
