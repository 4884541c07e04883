"""The stub server with what a vLLM server has beyond scoring: it samples, and takes new weights while it runs."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from stub_server import StubServer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


class StubVllm(StubServer):
    """What a test sets beside the fields of `StubServer`.

    defect, besides those of scoring: "raw" (log-probs at temperature 1), "seedless", "no-ids", "bos" (a token before the
    prompt), "early-end" (ends with an id that it was not told), "deaf" (says that it has loaded weights, and has not),
    "old-head" (loads all but the head), "packed-head" (loads the head only by its own name, as vLLM does on a CPU).
    """

    def __init__(self, model: Path, words: PreTrainedTokenizerFast | None = None) -> None:
        super().__init__(model, words)
        self.folder = self.started = model
        self.first = copy.deepcopy(self.model)
        self._turn = threading.Lock()  # one completion at a time: `model` is the one that answers
        self.development = self.runtime_lora = True
        self.adapters: dict[str, PeftModel] = {}
        self.loads: list[Path] = []
        self.served: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}  # the prefix cache: by model, salt and prompt
        self.restart_at: int | None = None  # completions until it is as it was at first,
        self.restarts_unseen = False  # and has failed once, unless this is set

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/collective_rpc" and self.development:
            return self.reload(body)
        if path == "/v1/load_lora_adapter" and self.runtime_lora:
            return self.load_adapter(body)
        if path == "/v1/unload_lora_adapter" and self.runtime_lora:
            return (200, "Success") if self.adapters.pop(body["lora_name"], None) else (404, "no such adapter")
        if path != "/v1/completions":
            return super().answer(path, body)
        with self._turn:
            if "return_token_ids" in body and self.restarts() and not self.restarts_unseen:
                return 503, "starting"
            base = self.model
            name = body["model"]
            if name in self.adapters:
                self.model, body = self.adapters[name], {**body, "model": "stub"}
            try:
                return self.complete(body, name)
            finally:
                if name != "stub":
                    self.model = base

    def complete(self, body: dict[str, Any], name: str) -> tuple[int, Any]:
        if "return_token_ids" not in body:
            return super().answer("/v1/completions", body)
        probe = {**body, "prompt": [body["prompt"]]}
        status, answer = super().answer("/v1/completions", probe)  # refusals are those of scoring
        return (status, answer) if status != 200 else (200, {"choices": [self.sampled(body, name)]})

    def sampled(self, body: dict[str, Any], name: str) -> dict[str, Any]:
        prompt: list[int] = body["prompt"]
        prompt = [0, *prompt] if self.defect == "bos" else prompt
        generator = torch.Generator()
        generator.seed() if self.defect == "seedless" else generator.manual_seed(body["seed"])
        tokens: list[int] = []
        values: list[float] = []
        tops: list[dict[str, float]] = []
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body.get("stop_token_ids", [])):
            row = self.logits(prompt, tokens, (name, body.get("cache_salt", ""), tuple(prompt)))
            temperature = body["temperature"]
            scaled = torch.log_softmax(row / (temperature or 1.0), -1)
            token = int(torch.multinomial(scaled.exp(), 1, generator=generator)) if temperature else int(row.argmax())
            shown = torch.log_softmax(row, -1) if self.defect == "raw" else scaled
            best = shown.topk(max(1, body["logprobs"]))
            tops.append({f"token_id:{i}": v for v, i in zip(*(part.tolist() for part in best), strict=True)})
            tokens.append(token)
            values.append(shown[token].item())
            if self.defect == "early-end":
                break
        choice = {"index": 0, "text": "x", "logprobs": {"token_logprobs": values, "top_logprobs": tops}}
        ids = {} if self.defect == "no-ids" else {"token_ids": tokens, "prompt_token_ids": prompt}
        return {**choice, **ids, "finish_reason": "length"}

    def logits(self, prompt: list[int], tokens: list[int], key: tuple[str, str, tuple[int, ...]]) -> Tensor:
        """After the prompt, those of the first time that it was seen under this name and salt, as a prefix cache has it."""
        if tokens or key not in self.served:
            with torch.no_grad():
                row: Tensor = self.model(torch.tensor([prompt + tokens])).logits[0, -1].double()
            if tokens:
                return row
            self.served[key] = row
        return self.served[key]

    def reload(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("method") != "reload_weights":
            return 400, {"error": "Missing 'method' in request body"}
        return self.load(Path(body["kwargs"]["weights_path"]), "model.safetensors")

    def load_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not body["lora_name"] or body["lora_name"] in self.adapters:
            return 400, {"error": "Both 'lora_name' and 'lora_path' must be provided, and new"}
        return self.load(Path(body["lora_path"]), "adapter_model.safetensors", body["lora_name"])

    def load(self, folder: Path, file: str, adapter: str | None = None) -> tuple[int, Any]:
        if not (folder / file).is_file():
            return 500, {"error": f"no {file} in {folder}"}
        self.loads.append(folder)
        if adapter is not None:
            source = self.folder if self.defect == "deaf" else folder
            started = self.folder == self.started
            base = copy.deepcopy(self.first) if started else AutoModelForCausalLM.from_pretrained(self.folder)
            self.adapters[adapter] = base if source == self.folder else PeftModel.from_pretrained(base, str(folder))
        elif self.defect != "deaf":
            head = self.model.lm_head.weight.detach().clone()
            # Not from_pretrained, which is for one thread at a time: a run that samples ahead learns meanwhile.
            weights = load_file(folder / file)
            self.model = copy.deepcopy(self.first)
            self.model.load_state_dict(weights, strict=False)
            if self.defect == "old-head" or (self.defect == "packed-head" and "lm_head.weight" not in weights):
                self.model.lm_head.weight = torch.nn.Parameter(head)
        return 200, {"results": [None]}

    def restarts(self) -> bool:
        """Whether it does so before this completion."""
        if self.restart_at is None:
            return False
        self.restart_at -= 1
        if self.restart_at >= 0:
            return False
        self.restart_at = None
        self.restart()
        return True

    def restart(self) -> None:
        self.model = copy.deepcopy(self.first)
        self.adapters.clear()
        self.served.clear()
