"""vLLM's own weight transfer: weights go from a GPU of this process to those of a server, over NCCL or CUDA IPC.

Written against `vllm.distributed.weight_transfer` of vLLM 0.32, which must be installed in this environment too. What is
sent is read from a folder, as the other ways read it: it may be of weights that the student no longer has.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from torch import Tensor

from fastkl.trainer.config.sampling import SamplingServerConfig
from fastkl.trainer.errors import ConfigError, ServerError, brief
from fastkl.trainer.servers.connection import Connection

API = "vllm.distributed.weight_transfer"
ENGINES = {"nccl": ("nccl_engine", "NCCLTrainerInitInfo"), "ipc": ("ipc_engine", "IPCTrainerInitInfo")}


class TransferLoader:
    """All weights of the served model, from GPU to GPU (see `Loader`)."""

    rereads = False

    def __init__(self, connection: Connection, config: SamplingServerConfig) -> None:
        self._connection, self._config = connection, config
        self._base = connection.url.removesuffix("/v1")
        self._engine: Any = None
        self._folder = Path()

    @property
    def _setting(self) -> str:
        return f"sampling.server.transfer is {self._config.transfer}"

    def check(self) -> None:
        """A ConfigError says what is missing here, or how to start a server that takes no weights so."""
        if not torch.cuda.is_available():
            raise ConfigError(f"{self._setting}, which moves weights between GPUs, but this process has none; unset it")
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        if self._config.transfer == "ipc" and several:
            raise ConfigError(f"{self._setting}, which takes a single process; set it to nccl, or unset it")
        self._api()
        self._workers()

    def load(self, folder: Path) -> str:
        self._folder = folder
        try:
            if self._engine is None:
                self._engine = self._connected()
            self._engine.send_weights()
        except Exception as error:  # of vLLM's, NCCL's or CUDA's kinds
            self._engine = None
            raise ServerError(
                f"{self._connection.whose} did not get the student's weights over {self._config.transfer}: {brief(error)}. "
                f"Does it serve the student's model, and does it run the same version of vLLM as this process? Start it "
                f"again, and give the same command: the run goes on where it stopped"
            ) from error
        return self._config.model

    def _connected(self) -> Any:
        api = self._api()
        client = api.HTTPVLLMWeightSyncClient(self._base, timeout=self._config.timeout)
        module, name = ENGINES[str(self._config.transfer)]
        rendezvous: dict[str, Any] = {}
        if self._config.transfer == "nccl":
            host = urlsplit(self._base).hostname or ""
            rendezvous = {
                "master_address": own_address(host),
                "master_port": free_port(),
                "world_size": 1 + self._workers(),
            }
        info = getattr(importlib.import_module(f"{API}.{module}"), name)(rank=0, **rendezvous)
        return api.WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source(api))

    def _source(self, api: Any) -> Any:
        """The newest folder's tensors, as vLLM's engines read them."""
        loader = self

        class Source(api.WeightSource):
            def metadata(self) -> list[Any]:
                return [
                    api.ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors(loader._folder)
                ]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return ((name, tensor.to("cuda")) for name, tensor in tensors(loader._folder))

        return Source()

    def _api(self) -> Any:
        try:
            return importlib.import_module(API)
        except ImportError as error:
            raise ConfigError(
                f"{self._setting}, but {API} cannot be imported here ({brief(error)}); install the server's vLLM in this "
                f"environment, or unset it"
            ) from error

    def _workers(self) -> int:
        """How many processes of the server take weights."""
        found = (self._connection.told(f"{self._base}/get_world_size") or {}).get("world_size")
        if not isinstance(found, int):
            raise ConfigError(
                f"{self._setting}, but {self._connection.whose} does not say how many processes it has, at "
                f"{self._base}/get_world_size. Start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config "
                f'\'{{"backend": "{self._config.transfer}"}}\', or unset it'
            )
        return found


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Of the folder's safetensors files, always in the same order."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_tensor(name)


def own_address(host: str) -> str:
    """The address of this machine that a host can reach."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as towards:
        towards.connect(address)  # which sends nothing
        return str(towards.getsockname()[0])


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])
