"""A vLLM server on a CPU for `measure.py vllm`. It has one core, and the run that asks it another."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

STUDENT = Path("runs/smollm2/student")
PATIENCE = 900  # seconds until the server is up
FLAGS = "--dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 8 --generation-config vllm --host 127.0.0.1"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def serving_alone(python: str, log: Path) -> Iterator[str]:
    """The address of a server that the environment's `python` runs on a core of its own; this process takes the other."""
    theirs, ours = sorted(os.sched_getaffinity(0))[:2]
    command = ["taskset", "-c", str(theirs), python, "-m", "vllm.entrypoints.openai.api_server", *FLAGS.split()]
    command += ["--model", str(STUDENT), "--served-model-name", "student", "--port", str(port := _free_port())]
    bound = {"VLLM_CPU_OMP_THREADS_BIND": str(theirs)}
    with open(log, "w") as file:
        server = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT, **bound}, stdout=file, stderr=file)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {ours})
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.sched_setaffinity(0, before)
        server.terminate()
        server.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            if requests.get(health, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(1)
    raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-3000:]}")
