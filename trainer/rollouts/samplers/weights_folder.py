"""Which folder a student's weights go through on their way to a sampling server."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from torch import nn

from fastkl.trainer.notes import note

MEMORY = Path("/dev/shm")
COPIES = 3  # that may be there at once: what the server has, what it gets, and one more; more with sampling.steps_ahead


def weights_folder(url: str, run: Path, size: float, copies: int = COPIES) -> Path:
    """A folder in memory where the server is on this machine and `copies` of `size` bytes have room; else the run's own."""
    own, here = run / "weights", _in_memory(run)
    if not is_here(urlsplit(url).hostname or ""):
        why = f"{url} is another machine's"
    elif _room() < copies * size:
        why = f"{copies} copies of {size / 1e9:.1f} GB have no room in {MEMORY}, where {_room() / 1e9:.1f} GB are free"
    else:
        note(f"weights go to the sampling server through {here}, which is memory")
        return here
    note(f"weights go to the sampling server through {own}: {why}. sampling.server.weights names another folder")
    return own


@contextmanager
def memory_emptied(run: Path) -> Iterator[None]:
    """Nothing of the run's weights is in memory afterwards, nor what a process that was killed has left, there or in
    the run's folder."""
    try:
        for left in (_in_memory(run), run / "weights"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        shutil.rmtree(_in_memory(run), ignore_errors=True)


def weights_size(model: nn.Module) -> float:
    """Bytes of what `save_weights` writes, about: of an adapter what is trained, else every parameter and a head."""
    adapter = hasattr(model, "merge_adapter")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad or not adapter]
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    return float(size + (0 if adapter else head.numel() * head.element_size()))


def is_here(host: str) -> bool:
    """Whether a host's name is one of this machine's: nobody else's address can be bound."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as bound:
                bound.bind(address)
                return True
        except OSError:
            continue
    return False


def _in_memory(run: Path) -> Path:
    return MEMORY / f"fastkl-{hashlib.sha256(str(run.expanduser().resolve()).encode()).hexdigest()[:16]}"


def _room() -> float:
    """Bytes that can be written to memory."""
    try:
        free = shutil.disk_usage(MEMORY).free
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return min(free, float(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):
        return 0.0
