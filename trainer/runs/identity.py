"""What makes a run this run beyond its settings: fingerprints of its rows and of the weights that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastkl.trainer.data.mixture import DataSet
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.errors import ConfigError

ENTRIES = 16  # of each tensor


class Identity:
    """Fingerprints by the name of what they are of. A checkpoint holds them; another's are refused."""

    def __init__(self, fingerprints: dict[str, str]) -> None:
        self._fingerprints = fingerprints

    def state_dict(self) -> dict[str, str]:
        return self._fingerprints

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Raises ConfigError naming what is not as it was when the run began."""
        others = [
            name for name, fingerprint in self._fingerprints.items() if state.get(name, fingerprint) != fingerprint
        ]
        if others:
            raise ConfigError(
                f"{' and '.join(others)} changed since the run began: same settings, other content. Bring back what was "
                f"there, or choose another run folder"
            )


def rows_of(data_sets: Iterable[DataSet], held_out: Mapping[str, Sequence[EncodedPrompt]]) -> dict[str, str]:
    """Fingerprints of the rows that a run learns from, and of those it is evaluated on, by their settings."""
    rows = {data_set.setting: data_set.prompts for data_set in data_sets} | {**held_out}
    return {f"the rows of {setting}": rows_fingerprint(prompts) for setting, prompts in rows.items()}


def rows_fingerprint(prompts: Iterable[EncodedPrompt]) -> str:
    """Of the rows as the run reads them: token ids, answers, completions and metadata, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        row = prompt.row
        digest.update(repr(prompt.ids).encode())
        digest.update(json.dumps([row.answer, row.completion, row.metadata], default=str).encode())
        digest.update(json.dumps(row.reply, default=str).encode() if row.reply else b"")
        digest.update(b"truncated" * row.truncated)
    return digest.hexdigest()


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Of names, shapes and dtypes, and of some entries of each tensor; an adapter on the model does not count."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(repr(_entries(tensor)).encode())
    return digest.hexdigest()


def _entries(tensor: torch.Tensor) -> list[Any]:
    flat = tensor.reshape(-1)
    count = min(ENTRIES, flat.numel())
    # In integers: a float32 place in a large tensor may be rounded beyond its end.
    places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
    entries: list[Any] = flat[places].float().tolist()
    return entries
