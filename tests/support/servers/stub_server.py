"""A completions server in a thread around a tiny model: real log-probs, in the forms of real servers, and their defects."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from tiny_models import tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastkl.trainer.servers import connection

Row = tuple[float, int, dict[int, float]]
Trouble = int | str  # a status, or "reset", "slow", "no-json", "a-list"


class StubServer:
    """What a test sets, and what it sees.

    defect: None, "ignored", "shifted" (the logits after a token, as llama-cpp-python), "late" and "early" (a place off),
    "bos" (a token is put before the prompt), "no-top", "positive", "nan", "one-choice", "reversed" (choices out of order).
    scores_lists: whether it knows vLLM's prompt_logprob_token_ids. list_defect: None, "ignored", "shifted" (to the place
    before), "sorted" (by id), "from-0" (`prompt_logprob_start` is ignored), "positive", "nan", "float64", "transposed".
    """

    def __init__(self, model: Path, words: PreTrainedTokenizerFast | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.words = tokenizer() if words is None else words
        self.apis = {"prompt_logprobs", "echo"}
        self.defect: str | None = None
        self.scores_lists, self.list_defect = False, ""
        self.tokenizes, self.tells_texts, self.scales, self.names_ids = True, True, False, True
        self.told_rank: Callable[[int], object] = lambda rank: rank
        self.context = 64
        self.most_logprobs, self.caps = (
            20,
            20,
        )  # beyond the one, requests are refused; lists are no longer than the other
        self.troubles: list[Trouble] = []  # one for each request to come, in order
        self.down_after: int | None = None  # requests that are answered before it is gone
        self.pause = 0.0
        self.headers: dict[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self.url = ""
        self.told: dict[str, Any] = {}  # what can be read, by its path

    def trouble(self) -> Trouble | None:
        with self._lock:
            if self.down_after is not None:
                self.down_after -= 1
                if self.down_after < 0:
                    return "reset"
            return self.troubles.pop(0) if self.troubles else None

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.pause)
        yield
        with self._lock:
            self.at_once -= 1

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/tokenize" and self.tokenizes:
            return 200, {"tokens": self.words(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/inference/v1/generate" and self.scores_lists:
            return self.lists(body["token_ids"], **body["sampling_params"])
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if body["model"] != "stub":
            return 404, {"error": f"The model {body['model']} does not exist"}
        if any(len(ids) + body["max_tokens"] > self.context for ids in body["prompt"]):
            return 400, {"error": f"maximum context length is {self.context} tokens"}
        if (body.get("prompt_logprobs") or body.get("logprobs") or 0) > self.most_logprobs:
            return 400, {"error": f"more than {self.most_logprobs} log-probs are not allowed"}
        if any(token >= self.model.config.vocab_size for ids in body["prompt"] for token in ids):
            return 400, {"error": "token id is out of vocabulary"}
        choices = [{"index": index, "text": "x", **self.scored(ids, body)} for index, ids in enumerate(body["prompt"])]
        choices = choices[:1] if self.defect == "one-choice" else choices
        return 200, {"choices": choices[::-1] if self.defect == "reversed" else choices}

    def lists(
        self,
        ids: list[int],
        max_tokens: int,
        temperature: float,
        prompt_logprob_token_ids: list[list[int]],
        prompt_logprob_start: int,
    ) -> tuple[int, Any]:
        """Of vLLM, docs/training/prompt_token_id_logprobs.md: as many rows as there are scored places, −inf for padding."""
        rows, start, defect = prompt_logprob_token_ids, prompt_logprob_start, self.list_defect
        width, vocabulary = max(map(len, rows)), self.model.config.vocab_size
        if len(ids) + max_tokens > self.context:
            return 400, {"error": f"maximum context length is {self.context} tokens"}
        if width > self.most_logprobs:
            return 400, {"error": f"requested prompt_logprob_token_ids of {width}, more than {self.most_logprobs}"}
        if len(rows) != len(ids) - 1 - start or any(not -1 <= token < vocabulary for row in rows for token in row):
            return 400, {
                "error": f"{len(rows)} rows for a prompt of {len(ids)} from {start}, or an id out of vocabulary"
            }
        found = self.logprobs(ids, temperature if self.scales else 1.0)
        places = (
            found[:-1] if defect == "from-0" else found.roll(1, 0)[start:-1] if defect == "shifted" else found[start:-1]
        )
        matrix = np.full((len(rows), width), -np.inf, np.float32)
        for place, (row, values) in enumerate(zip(rows, places, strict=False)):
            matrix[place, : len(row)] = values[sorted(row) if defect == "sorted" else row].numpy()
        if defect in ("positive", "nan"):
            matrix[0, 0] = 0.5 if defect == "positive" else np.nan
        matrix = matrix.astype(np.float64) if defect == "float64" else matrix.T if defect == "transposed" else matrix
        file = io.BytesIO()
        np.save(file, matrix)
        text = None if defect == "ignored" else base64.b64encode(file.getvalue()).decode()
        return 200, {"request_id": "x", "choices": [], "prompt_token_id_logprobs": text}

    def scored(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        api = "echo" if body.get("echo") else "prompt_logprobs"
        if api not in self.apis or self.defect == "ignored":
            return {"logprobs": None}
        logprobs = self.logprobs(ids, body["temperature"] if self.scales else 1.0)
        count = int(body.get("logprobs" if api == "echo" else "prompt_logprobs") or 0)
        # (log-prob of the token, its rank, likeliest tokens with their log-probs) for every token but the first
        rows: list[Row] = []
        for row, token in zip(*self.aligned(logprobs, ids), strict=True):
            values, likeliest = row.topk(min(count, self.caps))
            rank = 1 + int((row > row[token]).sum())
            rows.append((row[token].item(), rank, dict(zip(likeliest.tolist(), values.tolist(), strict=True))))
        if api == "echo":
            name = "token_id:{}" if body.get("return_tokens_as_token_ids") and self.names_ids else "<{}>"
            return {"logprobs": self.echo(ids, rows, logprobs[-1].max().item(), name)}
        return {"prompt_logprobs": [None, *(self.entry(token, *row) for token, row in zip(ids[1:], rows, strict=True))]}

    def aligned(self, logprobs: Tensor, ids: list[int]) -> tuple[Tensor, list[int]]:
        after = ids[1:]
        if self.defect == "shifted":
            return logprobs[1:], after
        if self.defect == "late":
            return torch.cat([logprobs[:1], logprobs[:-2]]), [ids[0], *after[:-1]]
        return logprobs[:-1], after

    def entry(self, token: int, own: float, own_rank: int, top: dict[int, float]) -> dict[str, Any]:
        own = {"positive": 0.5, "nan": float("nan")}.get(self.defect or "", own)
        found = {} if self.defect == "no-top" else {str(key): value for key, value in top.items()}
        rank: dict[str, object] = {key: place for place, key in enumerate(found, start=1)}
        rank[str(token)] = None if self.defect == "no-top" else self.told_rank(own_rank)
        found[str(token)] = own
        text = {key: self.words.decode([int(key)]) if self.tells_texts else None for key in found}
        return {k: {"logprob": v, "rank": rank[k], "decoded_token": text[k]} for k, v in found.items()}

    def echo(self, ids: list[int], rows: list[Row], generated: float, name: str) -> dict[str, Any]:
        values: list[float | None] = [None, *(own for own, _, _ in rows), generated]
        named = [{name.format(token): value for token, value in top.items()} for *_, top in rows]
        tops: list[Any] = [None, *named, {"x": generated}]
        texts = [self.words.decode([token]) for token in ids] + ["x"]
        if self.defect == "early":
            values, tops = [*values[1:], None], [*tops[1:], None]
        if self.defect == "bos":
            values, tops = [None, -3.0, *values[1:-1]], [None, {"x": -3.0}, *tops[1:-1]]
        return {
            "tokens": texts if self.tells_texts else None,
            "token_logprobs": values,
            "top_logprobs": None if self.defect == "no-top" else tops,
        }

    def logprobs(self, ids: list[int], temperature: float) -> Tensor:
        with self._lock, torch.no_grad():
            logits: Tensor = self.model(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits / temperature, -1)


Stub = TypeVar("Stub", bound=StubServer)


def handler(stub: StubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.authorizations.append(self.headers.get("Authorization"))
            with stub.counted():
                trouble = stub.trouble() if self.path == "/v1/completions" else None
                if trouble == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return self.connection.close()
                if trouble == "slow":
                    time.sleep(1.0)
                if isinstance(trouble, int):
                    return self.reply(trouble, f"trouble {trouble} {self.headers.get('Authorization')}".encode())
                if trouble in ("no-json", "a-list"):
                    return self.reply(200, b"<html>gateway</html>" if trouble == "no-json" else b"[1]")
                stub.bodies.append(body)
                status, answer = stub.answer(self.path, body)
            return self.reply(status, json.dumps(answer).encode())

        def do_GET(self) -> None:
            content = stub.told.get(self.path)
            self.reply(404 if content is None else 200, json.dumps(content).encode())

        def reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            for name, value in stub.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    return Handler


@contextmanager
def serving(
    model: Path, words: PreTrainedTokenizerFast | None = None, kind: Callable[..., Stub] = StubServer
) -> Iterator[Stub]:
    """The stub of a model folder over HTTP. Meanwhile nobody pauses for long before asking again."""
    stub = kind(model, words)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(stub))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that have gone
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "RETRY_PAUSE", 0.01)
        yield stub
    server.shutdown()
    server.server_close()
