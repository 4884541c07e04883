"""What every row function promises, as tests. A module of tests derives from a class here and has a fixture `tested`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from row_cases import (
    INF,
    Caps,
    UnderTest,
    assert_same_bits,
    biases,
    gap,
    laid_out,
    poisoned,
    random_rows,
    rows_far_apart,
)

from fastkl.kernels.rows.interface import Logits

WIDTH = 40  # one block; the interpreter takes about 10 ms for a row of a block
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
undefined = pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])


class RowContract:
    wide = WIDTH  # where blocks matter: two of them
    keeps_chunks = False  # those of the teacher, and without a gradient the student's
    rounding: Mapping[torch.dtype, float] = dict.fromkeys(DTYPES, 0.0)  # beside that of torch

    def test_no_rows(self, tested: UnderTest) -> None:
        values, gradient = tested.run(random_rows(0, 12))
        assert (values.shape[1], gradient.shape) == (0, (0, 12))

    @pytest.mark.parametrize("apart", DTYPES, ids=str)
    @pytest.mark.parametrize("cap", [None, 3.0])
    def test_gradient_apart(self, tested: UnderTest, apart: torch.dtype, cap: float | None) -> None:
        """What is written elsewhere, in the dtype of the next GEMM, is what would have been written in place, rounded.

        Where a factor of each row comes with it, before it is multiplied.
        """
        rows = random_rows(2, WIDTH)._replace(caps=(cap, cap))
        ours, expected = tested.run(rows, apart=apart), tested.run(rows)
        assert torch.equal(ours.values, expected.values)
        near = self.rounding[apart]
        exact = expected.gradient if near else expected.gradient.to(apart)
        torch.testing.assert_close(ours.gradient.to(exact.dtype), exact, rtol=near, atol=6e-8 if near else 0.0)

    def test_without_gradient(self, tested: UnderTest) -> None:
        rows = random_rows(2, WIDTH)
        values, chunk = tested.run(rows, gradient=False)
        assert torch.equal(values, tested.run(rows).values)
        assert torch.equal(chunk, rows.x) or not self.keeps_chunks

    @undefined
    def test_what_is_undefined_is_nan(self, tested: UnderTest, poison: str) -> None:
        """In its row alone: the first value and all of the gradient."""
        ours = tested.run(poisoned(random_rows(3, self.wide), poison))
        assert ours.values[0].isnan().tolist() == [False, True, False]
        assert ours.gradient.isnan().any(1).tolist() == ours.gradient.isnan().all(1).tolist() == [False, True, False]

    @pytest.mark.parametrize("wide", [False, True])
    def test_strides(self, tested: UnderTest, wide: bool) -> None:
        """Rows with a gap of NaN between them, results in the columns of a wider buffer, every second token."""
        rows = random_rows(3, self.wide if wide else WIDTH).to(torch.float32, tested.device)
        chunk, teacher = laid_out(rows.x), laid_out(rows.x_t)
        buffer = torch.full((6, 20), 7.0, device=tested.device)
        out = buffer[::2, 1::2].t()[: tested.outputs]
        assert rows.y is not None
        tested.function(Logits(chunk, None, teacher, None), rows.y.repeat_interleave(2)[::2], out, chunk)
        expected = tested.run(rows)
        assert torch.equal(out.cpu(), expected.values)
        assert torch.equal(chunk.cpu(), expected.gradient)
        assert torch.equal(teacher, rows.x_t) or not self.keeps_chunks
        assert gap(chunk).isnan().all()
        assert int((buffer == 7.0).sum()) == buffer.numel() - out.numel()


class TritonContract(RowContract):
    """Of those in Triton."""

    keeps_chunks = True
    # The interpreter cuts bf16 off, which is one unit of the last place.
    rounding: Mapping[torch.dtype, float] = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-11}

    def test_equals_the_definition(self, tested: UnderTest) -> None:
        """Straight against `fastkl.reference` and autograd, without the PyTorch row functions in between.

        Two tokens are forbidden on both sides, but for what a cap brings back.
        """
        for caps in ((None, None), (2.5, 3.5)):
            rows = random_rows(1, self.wide)._replace(caps=caps, y=torch.tensor([5]))
            for x in (rows.x, rows.x_t):
                x[0, [3, self.wide - 1]] = -INF
            ours, exact = tested.run(rows), tested.defined(rows)
            torch.testing.assert_close(ours.values.double(), exact.values, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ours.gradient.double(), exact.gradient, rtol=1e-5, atol=5e-7)

    def test_a_wide_soft_cap_costs_no_digits(self, tested: UnderTest) -> None:
        """Where the cap is 1000 and logits are near 2, tanh(x) ≈ x must be right relative to x."""
        tested.assert_right(random_rows(1, self.wide).scaled(1e-3)._replace(caps=(1e3, 1e3)))

    @pytest.mark.parametrize("caps", [(None, None), (2.5, 3.5)])
    def test_biases(self, tested: UnderTest, caps: Caps) -> None:
        """Added while rows are read: the bits are those of scores that have them, and the chunks stay without."""
        rows = random_rows(1, self.wide)._replace(caps=caps)
        both = biases(self.wide)
        for added in (both, (both[0], None), (None, both[1])):
            with_bias = rows._replace(biases=added)
            for apart in (None, torch.bfloat16) if added is both else (None,):
                assert_same_bits(tested.run(with_bias, apart=apart), tested.run(with_bias.added(), apart=apart))
        assert torch.equal(tested.run(with_bias, gradient=False).gradient, rows.x)
        tested.assert_right(rows._replace(biases=both))

    def test_same_bits_whatever_the_rows_around(self, tested: UnderTest) -> None:
        rows = random_rows(2, self.wide)
        whole, again, alone = (tested.run(r) for r in (rows, rows, rows.take(slice(1, 2))))
        assert torch.equal(again.values, whole.values)
        assert torch.equal(again.gradient, whole.gradient)
        assert torch.equal(alone.values[:, 0], whole.values[:, 1])
        assert torch.equal(alone.gradient[0], whole.gradient[1])

    def test_what_is_refused(self, tested: UnderTest) -> None:
        x, x_t = (t.to(tested.device) for t in random_rows(2, 8)[:2])
        y = torch.zeros(2, dtype=torch.int64, device=tested.device)
        out = torch.empty(tested.outputs, 2, device=tested.device)
        with pytest.raises(TypeError, match=r"float32 or torch.bfloat16, not torch.float64: pass .*torch"):
            tested.function(Logits(x.double(), None, x_t, None), y, out, None)
        with pytest.raises(TypeError, match=r"float32 or torch.bfloat16 or torch.float16, not torch.float64"):
            tested.function(Logits(x, None, x_t, None), y, out, x.double())
        with pytest.raises(ValueError, match=r"side by side"):
            tested.function(Logits(x.t().contiguous().t(), None, x_t, None), y, out, None)


def assert_far_apart_rows_are_right(tested: UnderTest, folder: Path) -> None:
    """Offsets beyond int32, of the student's rows and of the teacher's."""
    chunk = rows_far_apart(tested.device, folder)
    rows = random_rows(*chunk.shape).to(torch.bfloat16, tested.device)
    expected = tested.run(rows, torch.bfloat16)
    for x, x_t in ((chunk, rows.x_t), (rows.x.clone(), chunk)):
        chunk.copy_(rows.x if x is chunk else rows.x_t)
        values = torch.empty_like(expected.values, device=tested.device)
        tested.function(Logits(x, None, x_t, None), rows.y, values, x)
        assert torch.equal(values.cpu(), expected.values)
        assert torch.equal(x.cpu(), expected.gradient)


def outside(vocabulary: int) -> list[int]:
    """Ids that no vocabulary of this size has."""
    return [-1, -100, vocabulary, 2**40]
