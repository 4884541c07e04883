"""The k likeliest tokens by hidden states and a head, a chunk of rows at a time (`fastkl.loss`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl import _arguments as check
from fastkl.kernels.driver import chunk_rows
from fastkl.kernels.gemm import compute_dtype, project
from fastkl.kernels.problem import Inputs, Spec


class TopK(NamedTuple):
    """What `top_k_kl_loss` takes of a teacher."""

    ids: Tensor  # [..., k] int64
    logprobs: Tensor  # [..., k] in the compute dtype, descending, normalised over the whole vocabulary


@torch.no_grad()
def linear_top_k(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    k: int,
    *,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> TopK:
    """The k likeliest tokens and their log-probs: `torch.log_softmax(z, -1).topk(k)`. No gradient.

    Ids from `vocab_size` on, a head's padding, are left out as if they did not exist. Other arguments: `fastkl.loss`.

    Raises ValueError where k is not between 1 and the vocabulary; TypeError or ValueError for what does not fit.
    """
    options = check.head_options(temperature, logit_scale, softcap)
    check.check_head(hidden, weight, bias)
    check.check_plan("auto", chunk_size, weight, None)
    if vocab_size is not None:
        check.check_vocab_size(vocab_size, {"weight": weight.shape[0]})
        weight, bias = weight[:vocab_size], check.first_rows(bias, vocab_size)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k is {k}; it must be between 1 and the vocabulary, {weight.shape[0]}")
    hidden, weight, bias = check.autocast(hidden, weight, bias)
    inputs = Inputs(hidden.reshape(-1, hidden.shape[-1]), weight, bias, None)
    step = chunk_rows(Spec("token_nll", options, None, "torch", chunk_size), inputs, gradient=False)
    n, dtype = inputs.hidden.shape[0], compute_dtype(hidden.dtype)
    found = TopK(hidden.new_empty(n, k, dtype=torch.int64), hidden.new_empty(n, k, dtype=dtype))
    workspace = hidden.new_empty(min(n, step), weight.shape[0], dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            z = workspace[: rows.stop - start]
            project(inputs.hidden[rows], weight, bias, options.alpha, z)
            if options.cap is not None:
                z.tanh_().mul_(options.cap)
            values, found.ids[rows] = z.topk(k, -1)
            found.logprobs[rows] = values - torch.logsumexp(z, -1, keepdim=True)
    return TopK(*(tensor.reshape(*hidden.shape[:-1], k) for tensor in found))
