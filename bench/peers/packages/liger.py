"""Liger Kernel: the loss that it has for each op. The last two are PyTorch and run on a CPU too.

logprobs           LigerFusedLinearCrossEntropyLoss(reduction="none"): Triton; forms the logits again in backward
policy_gradient    LigerFusedLinearGRPOLoss, sequences of one token, no clipping, no KL penalty
divergences        LigerFusedLinearJSDLoss, no hard loss
"""

from __future__ import annotations

import math

import torch

from bench.lib.cases import BETAS, Case
from bench.peers import Loss, Peer
from bench.peers.packages import liger_triton


def build(case: Case, compiled: bool = True) -> Loss:
    """`compiled`: may Liger call torch.compile, as it does by default?"""
    if case.op == "logprobs":
        return liger_triton.build(case)
    return (_grpo if case.op == "policy_gradient" else _jsd)(case, compiled)


def _grpo(case: Case, compiled: bool) -> Loss:
    """Its advantages are one per sequence, ours one per token. All tokens in one chunk: it has smaller ones inside."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    n = case.hidden.shape[0]
    mask = torch.ones(n, 1, device=case.hidden.device)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=compiled,
        use_ref_model=False,
        chunk_size=n,
        epsilon_low=math.inf,
        epsilon_high=math.inf,
        loss_type="bnpo",  # the mean over tokens
    )
    sampler_logprobs = case.sampler_logprobs[:, None]
    return lambda: loss(
        case.hidden[:, None],
        case.weight,
        case.tokens[:, None],
        mask,
        case.advantages,
        old_per_token_logps=sampler_logprobs,
    )[0]


def _jsd(case: Case, compiled: bool) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[case.op], compiled=compiled)
    return lambda: loss(case.hidden, case.weight, *case.teacher, case.tokens)


PEER = Peer(
    build,
    ops=("logprobs", "policy_gradient", *BETAS),
    packages=("liger-kernel",),
    notes={
        "logprobs": "accumulates the weight's gradient in the weight's dtype (its default)",
        "policy_gradient": "its forward pass always forms the gradients too; its gradient GEMMs are float32 ones",
        **dict.fromkeys(BETAS, "always forms the weight's gradient, in its forward pass; softmax in the inputs' dtype"),
    },
)
