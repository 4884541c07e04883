"""Distillation losses on hidden states and the LM-head weight. The [tokens × vocabulary] logits never exist.

Every loss takes `hidden` [..., D], the head's `weight` [V, D] and per-token tensors [...], in float32, bfloat16 or float16
(float64 in: float64 throughout). `hidden`, `weight` and `bias` share a dtype, or torch.autocast is on and casts them as it
would for F.linear. Losses, log-probs and metrics are float32 (float64 for float64), computed with

    z = softcap((hidden weightᵀ + bias) · logit_scale) / temperature        softcap(x) = softcap · tanh(x / softcap)

a chunk of tokens at a time. The options they share, all keyword-only (linear_top_k and linear_ranks have those that concern
their values):

    bias            [V], the head's bias.
    temperature     > 0; the temperature that the tokens were sampled at.
    logit_scale     > 0; Granite: 1 / logits_scaling, Cohere: logit_scale.
    softcap         > 0 or None; Gemma 2: final_logit_softcapping.
    ignore_index    token id whose rows take no part: log-prob 0, gradient 0.
    chunk_size      tokens per chunk; by default what a workspace of 1 GiB holds (on a CPU 128 MiB, but at least 256
                    tokens). Results do not depend on it beyond the rounding of sums.
    skip_zero_rows  leave masked and ignored rows out of every GEMM, and rows of zero advantage out of the gradient ones.
                    Their number must be known on the host: a synchronisation or a few per call on an accelerator. False: no
                    synchronisation (as a CUDA graph needs), all rows are computed, and masked rows must be finite.
    backend         row functions: "triton", "torch", or "auto": Triton on CUDA and HIP devices, PyTorch elsewhere and for
                    float64.
    backward        "exact", or Sparse(seed=…): see below.
    weight_grad     [V, D] float32 (float64 for float64 weights), to which the backward pass adds the weight's gradient;
                    weight.grad is then left alone. For sums over micro-batches in full precision, such as Megatron's
                    weight.main_grad, or weight.grad itself where it is float32. Not under torch.compile.

Arguments that do not fit raise TypeError or ValueError, with their names, before anything is computed. So do token ids
outside the vocabulary on a CPU. On an accelerator nobody looks at them, which would be a synchronisation: their rows become
NaN (Triton) or end in a device-side assertion (PyTorch).
There are no gradients of gradients, and none in forward mode: backward with create_graph=True and torch.func.jvp are
refused. Gradients of float16 hidden states are float16 before an upstream gradient (a loss scale) multiplies them: use
bfloat16 where they are tiny. Formulas: `fastkl.reference`, where each loss stands once more as plain PyTorch.

Sparse backward
---------------
backward=Sparse(seed=…) makes the gradients of hidden and weight from a random subset of the vocabulary for each block of
rows (128 on a CPU, 1024 elsewhere). They are unbiased for every loss. On the peaked rows of a trained model they cost
little more than the forward pass. Values are exact. The bias's gradient is exact where the loss is reduced. Where it is
not (linear_logprobs, reduction="none") and weight or bias is trainable, it is made from the subset too.
docs/sparse-backward.md has the estimator, measurements, and when not to use it.

`Sparse` has the options: seed, error or threshold. The subset depends on chunk_size, but not among multiples of a block's
rows. By default a chunk has at least one block. A block of rows of which half the ids or more would be used is computed
exactly: flat rows are. Metrics: kept_fraction, how much of tokens × vocabulary was used, and grad_error, the expected
error (0 for what was computed exactly). Under torch.compile a loss that is not reduced and has a trainable head draws its
subset in the backward pass, and has neither metric.

Divergences
-----------
reverse_kl_loss, forward_kl_loss, jsd_loss, skewed_forward_kl_loss, skewed_reverse_kl_loss and total_variation_loss compare
the distributions over the whole vocabulary at each token; the teacher's logits exist no more than the student's. The
teacher is

    teacher_hidden, teacher_weight   [..., D_t] and [V, D_t]; D_t may differ from D. Or:
    teacher_logits                   [..., V] in float32, bfloat16 or float16 (float64 for float64), or a function from rows
                                     [n] (indices into the flattened tokens) to their logits [n, V], called chunk by chunk.
                                     The teacher's temperature, scale and soft-cap apply to them too. No function under
                                     torch.compile.

It has no gradient: ValueError where it requires one, or is given in two forms or none. The student's arguments are called
student_hidden and student_weight. Further options:

    tokens               [...], optional: where it is `ignore_index` the row takes no part; the others' student log-probs
                         are returned in `logprobs` (None without tokens).
    mask                 [...], bool or weights ≥ 0.
    vocab_size           for heads of one tokenizer padded to different sizes (Qwen2.5: 151936 and 152064 for 151665 ids):
                         the ids from it on are left out of both distributions.
    teacher_temperature  by default that of the student; squared_temperature=True multiplies the loss by temperature²
                         (Hinton et al., 2015), which is otherwise left to the learning rate.
    per_token            True: `LossOutput.per_token` has the by-products of the same pass: log-probs of `tokens` and
                         entropies on both sides, KL in both directions, top-1 agreement.
    reduction            "mean", "sum" or "none"; normalizer as in `policy_gradient_loss`.
    bias, logit_scale, softcap and teacher_bias, teacher_logit_scale, teacher_softcap describe the two heads.

Metrics, over the rows that take part: <divergence>_mean, <divergence>_max.
"""

from __future__ import annotations

from fastkl._loss.advantages import reverse_kl_advantages
from fastkl._loss.divergences import (
    forward_kl_loss,
    jsd_loss,
    reverse_kl_loss,
    skewed_forward_kl_loss,
    skewed_reverse_kl_loss,
    total_variation_loss,
)
from fastkl._loss.likeliest import TopK, linear_ranks, linear_top_k
from fastkl._loss.output import LossOutput
from fastkl._loss.policy_gradient import linear_logprobs, policy_gradient_loss, sampled_reverse_kl_loss
from fastkl._loss.top_k import top_k_kl_loss
from fastkl.kernels.divergence.formula import PerToken
from fastkl.kernels.sparse.estimator import Backward, Sparse

__all__ = [
    "Backward",
    "LossOutput",
    "PerToken",
    "Sparse",
    "TopK",
    "forward_kl_loss",
    "jsd_loss",
    "linear_logprobs",
    "linear_ranks",
    "linear_top_k",
    "policy_gradient_loss",
    "reverse_kl_advantages",
    "reverse_kl_loss",
    "sampled_reverse_kl_loss",
    "skewed_forward_kl_loss",
    "skewed_reverse_kl_loss",
    "top_k_kl_loss",
    "total_variation_loss",
]
