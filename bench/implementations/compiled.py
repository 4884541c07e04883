"""`torch.compile` of the eager loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case
from bench.implementations import Unsupported, eager


def build(case: Case) -> Callable[[], Tensor]:
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(2, device=case.hidden.device))
    except Exception as error:  # inductor raises a type of its own for each thing that may be missing
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Unsupported(f"torch.compile does not work here: {reason}") from error
    torch.compiler.reset()  # the shapes of another case would make this one's dynamic
    compiled = torch.compile(eager.loss)
    return lambda: compiled(case)
