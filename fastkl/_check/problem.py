"""The numbers that the checks are made on: random, the same on every machine, shaped like a language model's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOP_K = 8
SPREAD = 2.5  # deviation of the logits: no row is so peaked that float32 could not tell its gradient from rounding


class Sizes(NamedTuple):
    """Widths are multiples of 16, as nearly all models' are: the kernels are those that a model asks for."""

    rows: int
    dim: int
    vocabulary: int


# On a GPU: more than one tile of rows, a last block of the vocabulary that is partly empty, and a vocabulary that is scored
# in as many splits as one of 150,000 tokens.
SIZES = {"cpu": Sizes(24, 64, 5008), "cuda": Sizes(136, 256, 16656)}


class Problem(NamedTuple):
    """A student, a teacher and tokens, on a device."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, D]
    teacher_weight: Tensor  # [V, D]
    tokens: Tensor  # [N] int64, the first and the last of the vocabulary among them
    advantages: Tensor  # [N] float32; some are 0
    old_logprobs: Tensor  # [N] float32
    top_ids: Tensor  # [N, TOP_K] int64, the teacher's likeliest tokens
    top_logprobs: Tensor  # [N, TOP_K] float32
    biases: Tensor  # [2, V] float32, of heads that have one

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Problem:
        """A copy, with hidden states and weights in a dtype."""
        return Problem(*(copied(t, device, dtype) for t in self[:4]), *(copied(t, device) for t in self[4:]))


def copied(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Of memory of its own, wherever it was."""
    return torch.empty_like(tensor, device=device, dtype=dtype).copy_(tensor)


def make_problem(sizes: Sizes, device: str = "cpu") -> Problem:
    """In float32."""
    n, dim, vocabulary = sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden, weight = normal(n, dim), normal(vocabulary, dim) * (SPREAD / dim**0.5)
    teacher_hidden, teacher_weight = hidden + 0.3 * normal(n, dim), weight + 0.3 * normal(*weight.shape) / dim**0.5
    tokens = torch.randint(vocabulary, (n,), generator=generator, device=device)
    tokens[0], tokens[-1] = 0, vocabulary - 1
    advantages = normal(n)
    advantages[1::5] = 0.0
    logprobs = torch.log_softmax(hidden @ weight.t(), -1).gather(1, tokens[:, None]).squeeze(1)
    old_logprobs = (logprobs + 0.1 * normal(n)).clamp(max=0.0)
    top_logprobs, top_ids = torch.log_softmax(teacher_hidden @ teacher_weight.t(), -1).topk(TOP_K)
    biases = normal(2, vocabulary)
    return Problem(
        hidden, weight, teacher_hidden, teacher_weight, tokens, advantages, old_logprobs, top_ids, top_logprobs, biases
    )
