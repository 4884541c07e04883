"""What a score depends on beside the ids: which model, and how it computes."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastkl.trainer.servers.completions import CompletionsServer
from fastkl.trainer.servers.recheck import Reference
from fastkl.trainer.teachers.cache.store import Store

ADAPTERS = (".lora_", ".modules_to_save.")  # off while the base scores
UNREAD = ("_name_or_path", "transformers_version")  # of a config: where it is from

WORDS = 2**22  # at once
FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd; 2⁶⁴ over the golden ratio, as a signed number
GROWTH, MARGIN = 3.0, 1e-3  # so many times the noise of a server's answers, and some nats: less than another model does


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """Of every weight's name, dtype, shape and bits, of the config, of the device's kind and of the packages' versions.

    Not of an adapter on the model: the model without it is what scores.
    """
    config = _without(model.config.to_dict(), UNREAD)
    about = [config, model.config._attn_implementation, model.device.type, torch.__version__, transformers.__version__]
    digest = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and not any(part in name for part in ADAPTERS):
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape), _hash(tensor.detach()))).encode())
    return digest.hexdigest()


def server_fingerprint(server: CompletionsServer, reference: Reference, store: Store) -> str:
    """Of what a server says of its model, and of the log-probs that this gives a text.

    These vary with what else a server does: near ones are the same model's.
    """
    about = [*server.description(), reference.api, reference.ids, reference.temperature]
    limit = GROWTH * reference.noise + MARGIN
    return store.identity(json.dumps(about, default=str), reference.scores.logprobs, limit, lambda: uuid.uuid4().hex)


def _hash(tensor: Tensor) -> int:
    """Of the bytes, as 64-bit words w: Σ_i (2i + 1) K w_i mod 2⁶⁴, where the tensor is.

    One word that changes always changes it, for its factor is odd.
    """
    flat = tensor.reshape(-1).contiguous().view(torch.uint8)
    words = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    total = 0
    for first in range(0, len(words), WORDS):
        some = words[first : first + WORDS]
        places = torch.arange(first, first + len(some), device=some.device)
        total += int(((2 * places + 1) * FACTOR * some).sum())
    return total % 2**64


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {str(key): _without(entry, names) for key, entry in value.items() if key not in names}
    return value
