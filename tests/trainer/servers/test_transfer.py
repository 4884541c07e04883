"""vLLM's weight transfer, as far as a CPU goes: its own classes with another wire, or a stand-in of their interface.

FASTKL_VLLM=vv/bin/python python -m pytest -m slow tests/trainer/servers/test_transfer.py   # with vLLM's own
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from launches import REPOSITORY
from run_settings import config, distillation
from safetensors.torch import save_file
from torch import Tensor

from fastkl.trainer.config.sampling import SamplingServerConfig
from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.servers import transfer
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.transfer import TransferLoader

PYTHON = os.environ.get("FASTKL_VLLM", "")
URL = "http://127.0.0.1:9/v1"


class Meta(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Sent(NamedTuple):
    info: dict[str, Any]
    base: str
    timeout: float
    weights: list[dict[str, Tensor]]


def stand_in(sent: list[Sent], fails: Callable[[], bool]) -> dict[str, types.ModuleType]:
    """Modules with what the loader uses of vLLM 0.32."""

    class Client:
        def __init__(self, base_url: str, timeout: float = 300) -> None:
            self.base, self.timeout = base_url, timeout

    class Source:
        pass

    class Engine:
        def __init__(self, source: Any, own: Sent) -> None:
            self.source, self.own = source, own

        def send_weights(self) -> None:
            if fails():
                raise RuntimeError("NCCL error: unhandled system error")
            found = dict(self.source)
            assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.source] == self.source.metadata()
            self.own.weights.append(found)

    class Factory:
        @staticmethod
        def trainer_init(info: Any, *, client: Client, source: Source) -> Engine:
            assert isinstance(source, Source)
            sent.append(Sent(vars(info), client.base, client.timeout, []))
            return Engine(source, sent[-1])

    def info(name: str) -> type:
        class Info:
            backend: ClassVar[str] = name

            def __init__(self, **values: Any) -> None:
                vars(self).update(values)

        return Info

    base = types.ModuleType(transfer.API)
    vars(base).update(
        HTTPVLLMWeightSyncClient=Client, WeightSource=Source, ParamMeta=Meta, WeightTransferTrainerFactory=Factory
    )
    modules = {transfer.API: base}
    for name, (module, kind) in transfer.ENGINES.items():
        modules[f"{transfer.API}.{module}"] = types.ModuleType(module)
        setattr(modules[f"{transfer.API}.{module}"], kind, info(name))
    return modules


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """What was sent, from a process that believes it has a GPU to a server of two workers."""
    found: list[Sent] = []
    for name, module in stand_in(found, lambda: len(found) > 5).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Connection, "told", lambda self, url: {"world_size": 2} if "world_size" in url else None)
    monkeypatch.setattr(Tensor, "to", lambda self, device: self if device == "cuda" else NotImplemented)
    return found


def loader(kind: str = "nccl") -> TransferLoader:
    settings = SamplingServerConfig(url=URL, model="m", transfer=kind, timeout=7.0)  # type: ignore[arg-type]
    return TransferLoader(Connection(settings, "the sampling server"), settings)


def saved(folder: Path, seed: int) -> dict[str, Tensor]:
    """In two files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(3, 2, generator=generator) for name in ("b", "a", "lm_head.weight")}
    weights["a"] = weights["a"].bfloat16()
    save_file({"b": weights["b"]}, folder / "model-1.safetensors")
    save_file({name: weights[name] for name in ("lm_head.weight", "a")}, folder / "model-2.safetensors")
    return weights


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_the_newest_folder_is_sent(tmp_path: Path, sent: list[Sent], kind: str) -> None:
    server = loader(kind)
    server.check()
    wanted = [saved(tmp_path / str(turn), turn) for turn in range(3)]
    for turn in range(3):
        assert server.load(tmp_path / str(turn)) == "m"
    (engine,) = sent  # which is met once
    assert (engine.base, engine.timeout) == ("http://127.0.0.1:9", 7.0)
    assert engine.info.pop("rank") == 0
    if kind == "nccl":
        assert engine.info.pop("world_size") == 3
        assert engine.info.pop("master_address") == "127.0.0.1"
        assert 0 < engine.info.pop("master_port") < 2**16
    assert engine.info == {}
    for found, weights in zip(engine.weights, wanted, strict=True):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_what_fails_is_said_and_the_next_one_meets_anew(tmp_path: Path, sent: list[Sent]) -> None:
    server, message = (
        loader(),
        "did not get the student's weights over nccl: .*unhandled system error.*the same version",
    )
    saved(tmp_path / "a", 0)
    server.load(tmp_path / "a")
    sent += sent * 5
    with pytest.raises(ServerError, match=message):
        server.load(tmp_path / "a")
    del sent[1:]
    server.load(tmp_path / "a")
    assert len(sent) == 2


def test_refusals(tmp_path: Path, sent: list[Sent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "told", lambda self, url: None)
    with pytest.raises(
        ConfigError, match=r"get_world_size. Start it with .*DEV_MODE=1 and --weight-transfer-config .*nccl"
    ):
        loader().check()
    monkeypatch.setitem(sys.modules, transfer.API, None)
    with pytest.raises(ConfigError, match=f"{transfer.API} cannot be imported here .*install the server's vLLM"):
        loader().check()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="transfer is ipc, which takes a single process; set it to nccl"):
        loader("ipc").check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match="transfer is nccl, which moves weights between GPUs, but this process has none"
    ):
        loader().check()
    run = distillation(tmp_path / "run", tmp_path) | {"student.lora.rank": 4}
    run |= {"sampling.server.url": URL, "sampling.server.model": "m", "sampling.server.transfer": "nccl"}
    with pytest.raises(ConfigError, match=r"transfer is nccl and student.lora.rank is 4: vLLM loads an adapter"):
        config("distill", run)


OWN = """
import sys, types
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from vllm.distributed.weight_transfer import nccl_engine
from fastkl.trainer.config.sampling import SamplingServerConfig
from fastkl.trainer.servers import transfer
from fastkl.trainer.servers.connection import Connection

calls, wire = [], []
class Group:
    def broadcast(self, tensor, src, stream): wire.append(tensor.clone())
def post(self, path, json=None): calls.append((path, json))
transfer.importlib.import_module(transfer.API).HTTPVLLMWeightSyncClient._post = post
nccl_engine.open_trainer_endpoint = lambda info: Group()
torch.cuda.is_available = lambda: True
torch.cuda.current_stream = lambda *a: types.SimpleNamespace(synchronize=lambda: 0)
to = torch.Tensor.to
torch.Tensor.to = lambda self, *a, **k: self if a == ("cuda",) else to(self, *a, **k)
Connection.told = lambda self, url: {"world_size": 2}
info = nccl_engine.NCCLTrainerInitInfo.__init__
nccl_engine.NCCLTrainerInitInfo.__init__ = lambda self, **values: info(self, **values, packed=False)
settings = SamplingServerConfig(url="http://127.0.0.1:9/v1", model="m", transfer="nccl")
loader = transfer.TransferLoader(Connection(settings, "the server"), settings)
loader.check()
folder = Path(sys.argv[1])
assert loader.load(folder) == "m"
wanted = load_file(folder / "model-1.safetensors") | load_file(folder / "model-2.safetensors")
assert [path for path, _ in calls] == [
    "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]
told = calls[2][1]["update_info"]
assert told["names"] == ["b", "a", "lm_head.weight"], told
assert told["dtype_names"] == ["float32", "bfloat16", "float32"] and told["shapes"] == [[3, 2]] * 3, told
assert all(torch.equal(got, wanted[name]) for name, got in zip(told["names"], wire, strict=True))
assert calls[0][1]["init_info"]["world_size"] == 3 and calls[0][1]["init_info"]["rank_offset"] == 1
print("sent")
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="no vLLM: FASTKL_VLLM is unset")
def test_vllms_own_engine_takes_it(tmp_path: Path) -> None:
    """Its trainer's side of NCCL, with a communicator that only listens."""
    saved(tmp_path / "a", 0)
    done = subprocess.run(
        [PYTHON, "-c", OWN, str(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("sent\n"), done.stderr[-3000:]
