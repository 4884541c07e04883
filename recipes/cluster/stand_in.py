"""In the place of `vllm`, `srun` and `scontrol` while the recipe is rehearsed: the tests' stub serves, and one host is all.

python recipes/cluster/stand_in.py vllm serve FOLDER --served-model-name NAME --port N ...
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parents[2] / "tests" / "support"
sys.path[:0] = [str(SUPPORT / room) for room in ("servers", "models")]

NODES = 4


def vllm(words: list[str]) -> int:
    """Serves a model's folder under a name, until it is ended."""
    from stub_server import handler
    from stub_vllm import StubVllm
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("serve")
    parser.add_argument("model", type=Path)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    options, _ = parser.parse_known_args(words)

    class Named(StubVllm):
        def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
            known = body.get("model") == options.served_model_name
            return super().answer(path, body | {"model": "stub"} if known else body)

    stub = Named(options.model, AutoTokenizer.from_pretrained(options.model))
    stub.context = options.max_model_len
    kind: Any = handler(stub)
    kind.do_GET = lambda self: self.reply(200, b"{}")  # /health
    ThreadingHTTPServer(("127.0.0.1", options.port), kind).serve_forever()
    return 0


def srun(words: list[str]) -> int:
    """Starts the tasks here, each with its number; the first that fails decides. They end when it is ended."""
    tasks = next((int(word.partition("=")[2]) for word in words if word.startswith("--ntasks=")), 1)
    while words and words[0].startswith("--"):
        words = words[1:]
    started = [subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(task)}) for task in range(tasks)]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in started])
    return max((task.wait() for task in started), key=abs)


def scontrol(words: list[str]) -> int:
    print("127.0.0.1\n" * NODES, end="")
    return 0


if __name__ == "__main__":
    sys.exit({"vllm": vllm, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
