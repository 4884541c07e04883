"""A vLLM server on a CPU, started and ended here."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import requests

PATIENCE = 900  # seconds until the server is up
FLAGS = "--dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 8 --generation-config vllm --host 127.0.0.1"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def serving_vllm(
    python: Sequence[str],
    model: Path,
    name: str,
    folder: Path,
    more: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """The address of a server that has a model under a name. It works in `folder`, and writes `log` there.

    Args:
        python: That of an environment with vLLM, maybe after a command that starts it.
        more: Flags of vLLM, beside `FLAGS`.
        environment: Variables, beside `ENVIRONMENT`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    flags = [*FLAGS.split(), *more.split(), "--port", str(port)]
    served = ["--model", str(model.resolve()), "--served-model-name", name]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [*python, *module, *flags, *served],
            env={**os.environ, **ENVIRONMENT, **environment},
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", folder / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def _wait(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            if requests.get(health, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(1)
    raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-3000:]}")
