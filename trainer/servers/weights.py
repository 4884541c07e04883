"""How a vLLM server that runs takes new weights: it reads them from a folder when it is told to.

A LoRA adapter is loaded under a new name and from a new path each time, which every version understands: the one before is
taken out. All weights are read again in place, by the worker's `reload_weights`, which a server in development mode calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.servers.connection import Connection, Refused


class Loader(Protocol):
    """Has a server load weights."""

    rereads: bool  # the server may read the newest folder again, later

    def check(self) -> None:
        """A ConfigError says how to start a server that cannot."""
        ...

    def load(self, folder: Path) -> str:
        """The server samples from the folder's weights, by the returned model name; ServerError where it cannot."""
        ...


class AdapterLoader:
    """LoRA adapters on the served model."""

    rereads = True  # when others' adapters have pushed it out of memory

    def __init__(self, connection: Connection, rank: int) -> None:
        self._connection, self._rank = connection, rank
        self._loaded: str | None = None

    @property
    def _flags(self) -> str:
        return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank {self._rank} or more"

    def check(self) -> None:
        body = {"lora_name": "", "lora_path": ""}
        _probe(self._connection, f"{self._connection.url}/load_lora_adapter", body, self._flags)

    def load(self, folder: Path) -> str:
        if self._loaded is not None:
            try:
                self._connection.order(f"{self._connection.url}/unload_lora_adapter", {"lora_name": self._loaded})
            except Refused as error:  # a server that was started again has forgotten it
                if error.status not in (400, 404):
                    raise
        self._loaded = folder.name
        body = {"lora_name": folder.name, "lora_path": str(folder)}
        _order(self._connection, f"{self._connection.url}/load_lora_adapter", body, folder, self._flags)
        return folder.name


class ModelLoader:
    """All weights of the served model."""

    rereads = False
    FLAGS = "VLLM_SERVER_DEV_MODE=1"

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model
        self._url = f"{connection.url.removesuffix('/v1')}/collective_rpc"

    def check(self) -> None:
        _probe(self._connection, self._url, {}, self.FLAGS)

    def load(self, folder: Path) -> str:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        _order(self._connection, self._url, body, folder, self.FLAGS)
        return self._model


def _probe(connection: Connection, url: str, body: Mapping[str, object], flags: str) -> None:
    """Asks for nothing: a server that knows the request objects to its content."""
    try:
        connection.order(url, body)
    except Refused as error:
        if error.status not in (400, 422):
            raise ConfigError(
                f"{connection.whose} takes no new weights while it runs: {error}. Start it with {flags}"
            ) from error


def _order(connection: Connection, url: str, body: Mapping[str, object], folder: Path, flags: str) -> None:
    try:
        connection.order(url, body)
    except Refused as error:
        raise ServerError(
            f"{connection.whose} could not load the student's weights: {error}. Can it read {folder} (set "
            f"sampling.server.weights to a folder that both can), was it started with {flags}, and does it serve the "
            f"student's model?"
        ) from error
