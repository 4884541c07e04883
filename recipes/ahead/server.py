"""Stands in for a vLLM server on a CPU: a tiny model that samples in batches, and takes new weights while it runs.

    python recipes/ahead/server.py MODEL --seconds 2

It knows what fastkl asks of a server that samples, and no more. It prints its address when it is ready.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

TOGETHER = 0.005  # seconds that a batch waits for more requests


class Request(NamedTuple):
    """A completion that somebody waits for."""

    body: dict[str, Any]
    answer: queue.SimpleQueue[dict[str, Any]]


class Model:
    """The model, and one thread that computes completions with it.

    Args:
        folder: Where it is.
        seconds: How long the answer to a completion is held back at least.
    """

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        self.model, self.seconds = AutoModelForCausalLM.from_pretrained(folder).eval(), seconds
        self.requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._turn = threading.Lock()
        threading.Thread(target=self._work, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and content, as vLLM gives them at `/v1/completions` and `/collective_rpc`."""
        if path == "/collective_rpc":
            if body.get("method") != "reload_weights":
                return 400, {"error": "Missing 'method' in request body"}
            self.load(Path(body["kwargs"]["weights_path"]))
            return 200, {"results": [None]}
        if path != "/v1/completions":
            return 404, {"error": "Not Found"}
        if "return_token_ids" not in body:
            scores = [self.score(ids) for ids in body["prompt"]]
            return 200, {"choices": [{"index": i, "prompt_logprobs": each} for i, each in enumerate(scores)]}
        begin, found = time.monotonic(), queue.SimpleQueue[dict[str, Any]]()
        self.requests.put(Request(body, found))
        choice = found.get()
        time.sleep(max(0.0, begin + self.seconds - time.monotonic()))
        return 200, {"choices": [choice]}

    def load(self, folder: Path) -> None:
        with self._turn:
            self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # a tied head is no part

    @torch.no_grad()
    def score(self, ids: list[int]) -> list[Any]:
        """`prompt_logprobs` of a sequence."""
        with self._turn:
            rows = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        values = rows[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        return [None, *({str(i): {"logprob": v, "rank": 1}} for i, v in zip(ids[1:], values, strict=True))]

    def _work(self) -> None:
        while True:
            batch = [self.requests.get()]
            time.sleep(TOGETHER)
            while not self.requests.empty():
                batch.append(self.requests.get())
            with self._turn:
                answers = self._complete([request.body for request in batch])
            for request, answer in zip(batch, answers, strict=True):
                request.answer.put(answer)

    @torch.no_grad()
    def _complete(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each row draws with a generator of its own seed, whatever stands beside it."""
        most, width = max(b["max_tokens"] for b in bodies), max(len(b["prompt"]) for b in bodies)
        drawn = torch.stack([torch.rand(most, generator=torch.Generator().manual_seed(b["seed"])) for b in bodies])
        temperatures = torch.tensor([b["temperature"] for b in bodies])[:, None]
        ids = torch.tensor([[0] * (width - len(b["prompt"])) + b["prompt"] for b in bodies])
        mask = torch.tensor([[0] * (width - len(b["prompt"])) + [1] * len(b["prompt"]) for b in bodies])
        ends = [set(b.get("stop_token_ids", ())) for b in bodies]
        tokens: list[list[int]] = [[] for _ in bodies]
        values: list[list[float]] = [[] for _ in bodies]
        tops: list[list[dict[str, float]]] = [[] for _ in bodies]
        cache = None
        for place in range(most):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache, rows = (
                out.past_key_values,
                (out.logits[:, -1].double() / temperatures.clamp_min(1e-9)).log_softmax(-1),
            )
            rows = torch.where(temperatures > 0, rows, out.logits[:, -1].double().log_softmax(-1))
            ids = torch.where(temperatures > 0, draw(rows, drawn[:, place, None]), rows.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            over = True
            for row, (body, token) in enumerate(zip(bodies, ids[:, 0].tolist(), strict=True)):
                if len(tokens[row]) < body["max_tokens"] and not (tokens[row] and tokens[row][-1] in ends[row]):
                    tokens[row].append(token)
                    values[row].append(rows[row, token].item())
                    best = rows[row].topk(body["logprobs"])
                    tops[row].append({f"token_id:{i}": v for v, i in zip(*map(Tensor.tolist, best), strict=True)})
                    over = False
            if over:
                break
        return [
            {
                "index": 0,
                "token_ids": ids,
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": own, "top_logprobs": top},
                "finish_reason": "length",
            }
            for body, ids, own, top in zip(bodies, tokens, values, tops, strict=True)
        ]


class Server(ThreadingHTTPServer):
    """A model over HTTP."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, model: Model, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.url = model, f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """Asks the model."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.server.model.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [B, 1] of log-probs [B, V], by numbers [B, 1] in 0 … 1."""
    sums = logprobs.exp().cumsum(-1)
    return torch.searchsorted(sums, uniform.double() * sums[:, -1:]).clamp_max(logprobs.shape[-1] - 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="serve the model of this folder")
    parser.add_argument("--seconds", type=float, default=0.0, help="hold each completion back this long at least")
    parser.add_argument("--port", type=int, default=0, help="listen here; 0: on a port that is free")
    given = parser.parse_args()
    torch.set_num_threads(1)
    server = Server(Model(given.model, given.seconds), given.port)
    print(server.url, flush=True)
    server.serve_forever()
