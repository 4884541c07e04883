"""A cross-entropy as a row function under test, with what there is of smoothing, z-loss and class weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from problem import generator
from row_cases import UnderTest
from torch import Tensor

from fastkl import reference
from fastkl.kernels.options import CrossEntropy
from fastkl.kernels.rows.cross_entropy import pytorch
from fastkl.kernels.rows.interface import Logits, RowFunction

OPTIONS = {
    "plain": CrossEntropy(),
    "smoothed": CrossEntropy(label_smoothing=0.1),
    "regularised": CrossEntropy(z_loss=0.01),
    "both": CrossEntropy(0.3, 0.02),
    "flat": CrossEntropy(label_smoothing=1.0),
}
BEYOND = "both at the lowest number"  # of `row_cases.edges`: smoothing sums what float32 has no sum of
IDS = 4  # the row of the values that has them


def class_weights(vocabulary: int) -> Tensor:
    """Of several sizes; some are 0."""
    return torch.tensor([0.0, 0.25, 1.0, 3.0])[torch.randint(4, (vocabulary,), generator=generator(vocabulary))]


def under_test(module: Any, options: CrossEntropy, weighted: bool, device: str = "cpu", ids: bool = False) -> UnderTest:
    """`ids`: with the likeliest id of each row."""

    def function(of: Any, logits: Logits, *arguments: Any) -> None:
        c = class_weights(logits.student.shape[1]).to(logits.student.device) if weighted else None
        dtype = torch.float64 if logits.student.dtype == torch.float64 else torch.float32
        of.cross_entropy(options, logits._replace(class_weight=None if c is None else c.to(dtype)), *arguments)

    def definition(z: Tensor, _: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        c = class_weights(z.shape[1]) if weighted else None
        gap = z.amax(-1) - z.gather(1, y[:, None]).squeeze(1)
        value = reference.cross_entropy(z, y, options.label_smoothing, options.z_loss, c)
        values = [value, -reference.logprobs(z, y), torch.logsumexp(z, -1), gap, z.argmax(-1).to(z.dtype)]
        return torch.stack(values[: IDS + ids])

    functions: list[RowFunction] = [partial(function, of) for of in (module, pytorch)]
    return UnderTest(*functions, definition, IDS + ids, device)
