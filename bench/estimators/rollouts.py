"""A student and a teacher, and what both say at the tokens that the student samples."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.lib.real_rows import MODELS, completions, load
from fastkl import reference
from fastkl.head import fuse


class Pair(NamedTuple):
    teacher: Any  # causal LMs of Transformers
    student: Any
    tokenizer: Any


class Samples(NamedTuple):
    """N on-policy positions, completion after completion, at the sampling temperature."""

    hidden: Tensor  # [N, D] float32, the student's
    log_p: Tensor  # [N, V] float32, the student's
    log_q: Tensor  # [N, V] float32, the teacher's
    tokens: Tensor  # [N], sampled
    lengths: list[int]  # of the completions

    def spans(self) -> list[slice]:
        """The rows of each completion."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]


def load_model(name: str) -> tuple[Any, Any]:
    """Model and tokenizer: one of `MODELS`, or a folder or Hub id, in float32."""
    if name in MODELS:
        return load(MODELS[name])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def read_questions(file: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def spoiled(model: Any, dropped: Collection[int], bits: int | None) -> Any:
    """A copy that lacks some layers, and whose other layers are rounded to so many bits. It shares the embeddings.

    Raises:
        ValueError: For a layer that the model does not have.
    """
    layers = model.base_model.layers
    missing = [index for index in dropped if not index < len(layers)]
    if missing:
        raise ValueError(f"there is no layer {missing[0]}; the model's are 0 … {len(layers) - 1}")
    shared = model.get_input_embeddings(), model.get_output_embeddings()
    student = copy.deepcopy(model, {id(module): module for module in shared})
    kept = [layer for index, layer in enumerate(student.base_model.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    student.base_model.layers = nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    if bits is not None:
        for module in student.base_model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = rounded(module.weight.data, bits)
    return student


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Each row to the nearest of 2^bits − 1 multiples of a step, symmetric around 0."""
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return torch.round(weight / step) * step


def sample(pair: Pair, texts: Sequence[str], new_tokens: int, temperature: float, seed: int = 0) -> Samples:
    """One completion of each text by the student, and both models' distributions at its tokens.

    Raises:
        ValueError: Where the two vocabularies differ, or where the student's logits are soft-capped: each entry of the
            head's gradient would then have a factor of its own.
    """
    torch.manual_seed(seed)
    sampled = list(completions(pair.student, pair.tokenizer, texts, temperature, new_tokens))
    student, teacher = _Head(pair.student), _Head(pair.teacher)
    if student.options["softcap"] is not None:
        raise ValueError("the student's logits are soft-capped, and the gradient of such a head is not measured here")
    states = [(student.states(*tokens), teacher.states(*tokens)) for tokens in sampled]
    if student.weight.shape[0] != teacher.weight.shape[0]:
        raise ValueError(
            f"the student has {student.weight.shape[0]} tokens, the teacher {teacher.weight.shape[0]}; give a pair with "
            f"one vocabulary"
        )
    ours, theirs = (torch.cat(part) for part in zip(*states, strict=True))
    tokens = torch.cat([new for _, new in sampled])
    log_p, log_q = student.logprobs(ours, temperature), teacher.logprobs(theirs, temperature)
    return Samples(ours, log_p, log_q, tokens, [len(new) for _, new in sampled])


class _Head:
    """A model up to its head, and the head in float32."""

    def __init__(self, model: Any) -> None:
        self._model = fuse(model)
        weight, self.options = self._call(
            torch.zeros(1, 1, dtype=torch.int64), lambda _, weight, **head: (weight, head)
        )
        self.weight = weight.detach().float()

    def states(self, prompt: Tensor, new: Tensor) -> Tensor:
        """[n, D] float32, at the positions that predict `new`."""
        hidden: Tensor = self._call(torch.cat([prompt, new])[None], lambda hidden, _, **__: hidden)
        return hidden[0, len(prompt) - 1 : -1].float()

    @torch.no_grad()
    def logprobs(self, hidden: Tensor, temperature: float) -> Tensor:
        """[N, V]."""
        result = hidden.new_empty(hidden.shape[0], self.weight.shape[0])
        for rows, out in zip(hidden.split(64), result.split(64), strict=True):
            logits = reference.logits(rows, self.weight, temperature=temperature, **self.options)
            torch.log_softmax(logits, -1, out=out)
        return result

    @torch.no_grad()
    def _call(self, ids: Tensor, function: Any) -> Any:
        return self._model(input_ids=ids, fused=function)
