"""What a teacher wrote into a sample, as bytes and back, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fastkl.loss import TopK
from fastkl.trainer.data.samples import ARRAYS, Sample


class Damaged(Exception):
    """These bytes are no scores of this sample."""


def pack(sample: Sample, fields: Sequence[str]) -> bytes:
    """What these fields say of the counted tokens."""
    found: dict[str, np.ndarray] = {}
    for name in fields:
        value = getattr(sample, name)
        if isinstance(value, TopK):
            found |= {f"{name}.{part}": tensor.numpy() for part, tensor in value._asdict().items()}
        elif value is not None and len(value):
            found[name] = value[sample.loss_mask]
    return save(found)


def restore(sample: Sample, content: bytes) -> None:
    """Writes into the fields what was packed.

    Raises:
        Damaged: Where it does not fit the sample, which stays as it was.
    """
    try:
        found = load(content)
    except SafetensorError as error:
        raise Damaged from error
    if any(len(values) != sample.loss_tokens for values in found.values()):
        raise Damaged
    for name in {name.partition(".")[0] for name in found}:
        if name in found:
            row = np.zeros(len(sample.ids), ARRAYS[name])
            row[sample.loss_mask] = found[name]
            setattr(sample, name, row)
        else:
            ids, logprobs = (torch.from_numpy(found[f"{name}.{part}"]) for part in TopK._fields)
            setattr(sample, name, TopK(ids.int(), logprobs))
