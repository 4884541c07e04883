"""When the logits product with the row pass in its epilogue is chosen: where a measurement says that it is faster.

`python -m bench loss --op policy_gradient --impl fastkl,fastkl_epilogue --device cuda --dtype bf16` measures both plans. An
entry is added with the report under bench/results/ that it comes from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """What was measured to be faster."""

    chip: str  # as torch.cuda.get_device_name has it
    dtype: torch.dtype  # of the head
    hidden_sizes: range
    vocabularies: range


MEASURED: tuple[Entry, ...] = ()  # no GPU has measured it


def is_faster(hidden: Tensor, weight: Tensor) -> bool:
    """For hidden states [N, D] and the weight [V, D] of a head."""
    if not MEASURED or not hidden.is_cuda:
        return False
    chip = torch.cuda.get_device_name(hidden.device)
    return any(
        (chip, hidden.dtype) == (entry.chip, entry.dtype)
        and hidden.shape[1] in entry.hidden_sizes
        and weight.shape[0] in entry.vocabularies
        for entry in MEASURED
    )
