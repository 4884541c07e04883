"""Liger Kernel: the loss that it has for each op. The last two are PyTorch and run on a CPU too.

logprobs, cross_entropy          LigerFusedLinearCrossEntropyLoss: Triton; the first forms the logits again in backward
policy_gradient, grpo, grpo_kl   LigerFusedLinearGRPOLoss, sequences of one token; policy_gradient without clipping
divergences                      LigerFusedLinearJSDLoss, no hard loss
"""

from __future__ import annotations

import math
from typing import Any

import torch

from bench.lib.cases import BETAS, OF_LOGPROBS, SURROGATES, Case
from bench.peers import Loss, Peer
from bench.peers.packages import liger_triton

GRPO = ("policy_gradient", "grpo", "grpo_kl")
CLIP = 0.2


def build(case: Case, compiled: bool = True) -> Loss:
    """`compiled`: may Liger call torch.compile, as it does by default?"""
    if case.op not in (*GRPO, *BETAS):
        return liger_triton.build(case)
    from liger_kernel import chunked_loss

    return build_chunked(case, chunked_loss, compiled)


def build_chunked(case: Case, classes: Any, compiled: bool) -> Loss:
    """`classes` has those of liger_kernel.chunked_loss, under their names."""
    return (_grpo if case.op in GRPO else _jsd)(case, classes, compiled)


def _grpo(case: Case, classes: Any, compiled: bool) -> Loss:
    """Its advantages are one per sequence, ours one per token. All tokens in one chunk: it has smaller ones inside."""
    n, beta = case.hidden.shape[0], SURROGATES[case.op].get("ref_kl_coef", 0.0)
    mask = torch.ones(n, 1, device=case.hidden.device)
    clip = math.inf if case.op == "policy_gradient" else CLIP
    loss = classes.LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=compiled,
        use_ref_model=beta > 0,
        chunk_size=n,
        epsilon_low=clip,
        epsilon_high=clip,
        loss_type="bnpo",  # the mean over tokens
    )
    logprobs = {"old_per_token_logps": case.sampler_logprobs[:, None]}
    if case.ref_logprobs is not None:
        logprobs["ref_per_token_logps"] = case.ref_logprobs[:, None]
    tokens = case.tokens[:, None]
    return lambda: loss(case.hidden[:, None], case.weight, tokens, mask, case.advantages, **logprobs)[0]


def _jsd(case: Case, classes: Any, compiled: bool) -> Loss:
    loss = classes.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[case.op], compiled=compiled
    )
    return lambda: loss(case.hidden, case.weight, *case.teacher, case.tokens)


PEER = Peer(
    build,
    ops=(*OF_LOGPROBS, *BETAS),
    packages=("liger-kernel",),
    notes={
        **dict.fromkeys(("logprobs", "cross_entropy"), liger_triton.IN_ITS_DTYPE),
        **dict.fromkeys(GRPO, "its forward pass always forms the gradients too; its gradient GEMMs are float32 ones"),
        **dict.fromkeys(BETAS, "always forms the weight's gradient, in its forward pass; softmax in the inputs' dtype"),
    },
)
