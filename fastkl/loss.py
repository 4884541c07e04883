"""Distillation losses on hidden states and the LM-head weight. The [tokens × vocabulary] logits never exist.

Every loss takes `hidden` [..., D], the head's `weight` [V, D] and per-token tensors [...]. The dtypes are float32, bfloat16
or float16, or float64 throughout. Where `hidden`, `weight` and `bias` differ, float32 is cast to the 16-bit dtype, as
torch.autocast does it; gradients come back in the dtype of each tensor. Under torch.autocast its dtype is used. Losses,
log-probs and metrics are float32 (float64 for float64). Products sum in float32. The operands of float32 products are
rounded as torch.set_float32_matmul_precision says: not at all by default; under "high" or "medium" to what the device
multiplies faster, TF32 or bfloat16, as in the model's own products. Triton kernels never round them. The logits are
computed a chunk of tokens at a time:

    z = softcap((hidden weightᵀ + bias) · logit_scale) / temperature        softcap(x) = softcap · tanh(x / softcap)

All losses share these keyword arguments. linear_top_k, linear_list_logprobs and linear_ranks take those that concern their
values, and group.

    bias            [V], the head's bias.
    temperature     > 0. Use the temperature that the tokens were sampled at.
    logit_scale     > 0. Granite: 1 / logits_scaling. Cohere: logit_scale.
    softcap         > 0, or None. Gemma 2: final_logit_softcapping.
    ignore_index    Token id that marks ignored tokens. Their log-probs and gradients are 0.
    chunk_size      Tokens per chunk, at most. Default: what fits into 1 GiB (on a CPU 128 MiB, but at least 256 tokens). On
                    an accelerator chunks are whole tiles of 256 tokens, or 128, where they fit. There a trained 16-bit head
                    has the gradients of up to about 5120 tokens more by default (2 V bytes each), for long products.
                    Results depend on it only by the rounding of sums.
    skip_zero_rows  True: masked and ignored tokens are left out of every GEMM, and tokens of zero advantage out of the
                    GEMMs of gradients. Their number must be known on the host, which costs one or more synchronisations
                    per call on an accelerator. False: no synchronisation, as a CUDA graph needs. All rows are then
                    computed. Either way masked rows may hold anything, NaN included: nothing of them reaches a result.
    backend         "triton", "torch", or "auto": Triton on CUDA and HIP devices, PyTorch elsewhere and for float64.
                    "epilogue": Triton, and a policy gradient with old_logprobs of a 16-bit head without logits in memory.
                    No GPU has measured it yet. docs/speed/speed.md has more.
    backward        "exact", or Sparse(seed=…). See below.
    weight_grad     [V, D] float32 (float64 for float64 weights). The backward pass adds the weight's gradient to it and
                    leaves weight.grad alone. Use it to sum over micro-batches in full precision, for example with
                    Megatron's weight.main_grad, or with weight.grad itself if that is float32. Not under torch.compile.
    group           The process group, or DeviceMesh of one dimension, whose processes have the head in pieces. See below.

weight, bias and those of a teacher may be DTensors, sharded by FSDP 2 or tensor parallelism. hidden and what is per token
are the process's own, plain tensors. A head with `Shard(0)` is taken in pieces where the processes have the same tokens.
Elsewhere each process gathers all of the tensor for the call, and its gradient too before that is sharded again. Gradients
of the processes are then averaged, as FSDP does it.

Arguments that do not fit raise TypeError or ValueError before anything is computed. The message names the argument. On a
CPU this includes, in tokens that take part, ids outside the vocabulary and log-probs that are NaN or above 0. On an
accelerator those checks would be synchronisations, so they are left out: rows of ids that do not exist become NaN (Triton)
or end in a device-side assertion (PyTorch). On a CPU a divergence also refuses a teacher that gives NaN or +inf, once its
values show it. A student's NaN is never refused: the loss is then NaN.

Gradients go to hidden, weight and bias alone. mask, class_weight, advantages and the log-probs of other policies are
constants. A number that requires a gradient, as a learned temperature would, is refused.

The losses cannot be differentiated twice, nor in forward mode: backward with create_graph=True and torch.func.jvp are
refused. Gradients of float16 hidden states are rounded to float16 before the upstream gradient (a loss scale) multiplies
them. Use bfloat16 where they are tiny. `fastkl.reference` has the formula of each loss in plain PyTorch.

Tokens
------
linear_cross_entropy is F.cross_entropy of a head. linear_logprobs gives log-probs of tokens, and linear_token_stats gives
entropies and lse too. Both take any upstream gradients, for losses of your own. policy_gradient_loss and
sampled_reverse_kl_loss have the advantages inside, which saves a unit of a trained head.

Sparse backward
---------------
backward=Sparse(seed=…) makes the gradients of hidden and weight from a random subset of the vocabulary for each block of
rows (128 on a CPU, 1024 elsewhere). They are unbiased for every loss. On the peaked rows of a trained model they cost
little more than the forward pass. Values are exact. The bias's gradient is exact where the loss is reduced. Where it is
not (linear_logprobs, reduction="none") and weight or bias is trainable, it is made from the subset too.
docs/losses/sparse-backward.md has the estimator, measurements, and when not to use it.

`Sparse` has the options: seed, error or threshold. The subset depends on chunk_size, but not among multiples of a block's
rows. By default a chunk has at least one block. A block that would use half of the ids or more is computed exactly, as flat
rows are. Metrics: kept_fraction is the part of tokens × vocabulary that was used, and grad_error the expected error (0 for
what was computed exactly). Under torch.compile a loss that is not reduced and has a trainable head draws its subset in the
backward pass, and has neither metric.

A head in pieces
----------------
With group= each process of the group has the same tokens and some rows of the head: those of its rank, one rank after the
other, as many as it likes. weight, weight_grad, bias, teacher_weight, teacher_bias and teacher_logits are its own part, of
the same ids for student and teacher. Ids, vocab_size and class_weight are those of the whole vocabulary. Every process gets
the whole result, with the same bits: losses, metrics, by-products and the gradient of hidden, which is already summed over
the group. The gradients of weight and bias are those of its own rows. The accuracy is that of the whole head.

A chunk of rows costs one exchange of a few numbers a row; divergences, entropies, label smoothing, top-k, lists and ranks
cost two. The gradient of hidden is one sum of [N, D] float32 over the group. Backward passes are collectives too.

A call begins with an exchange of 84 numbers, a synchronisation on an accelerator: the processes compare everything that is
not their own part of a head. Where an argument differs all raise ValueError, before anything is checked or computed. The
message names the argument, and two values of it. Tensors are compared by a few sums; hidden may differ by rounding.

A DTensor with Shard(0) on one dimension of its mesh needs no group: that dimension's is taken, if the processes were given
the same. A bias is split like the weight, or all is gathered; a teacher may be split or whole. All is gathered, too, under
torch.compile, for a sparse backward, a Triton backend, a function as teacher_logits or skip_zero_rows=False.

With group= skip_zero_rows=False works; the others of these are refused, and backend="triton" is for divergences, label
smoothing and the predictions of a cross-entropy. "auto" is PyTorch for these, on a GPU too: their kernels make the values
and the gradient of a row in one launch, with no exchange between. docs/losses/losses.md has a table.

Divergences
-----------
reverse_kl_loss, forward_kl_loss, jsd_loss, skewed_forward_kl_loss, skewed_reverse_kl_loss, total_variation_loss and
density_power_loss compare student and teacher over the whole vocabulary at each token. The teacher's logits never exist
either. Their arguments student_hidden and student_weight are `hidden` and `weight`. The teacher is a head or logits, not
both:

    teacher_hidden, teacher_weight   [..., D_t] and [V, D_t]. D_t may differ from D.
    teacher_logits                   [..., V] in float32, bfloat16 or float16 (float64 for float64). Or a function from rows
                                     [n], indices into the flattened tokens, to their logits [n, V]; it is called once per
                                     chunk, and not under torch.compile. The teacher's temperature, scale and soft-cap
                                     apply to these logits too.

common_vocabulary_logits makes a head with another vocabulary into such a function: the tokens that both have are compared,
and all others as one outcome.

The teacher has no gradient. Parameters and other leaf tensors of its head are detached, so that student and teacher may
share a head. A tensor of it that was computed under autograd raises ValueError, and so do logits that require a gradient.
Further options:

    tokens               [...]. Tokens that are `ignore_index` are left out. `LossOutput.logprobs` has the student's
                         log-probs of the others; without tokens it is None.
    hard_coef            ≥ 0. Adds hard_coef · (−log p¹ of the token) to each token's loss, in the same pass, at no GEMM. p¹
                         is the student at temperature 1, whatever `temperature` is. It needs `tokens`; masked and ignored
                         ones are left out of both parts, and the mean has one divisor. The recipe of Hinton et al.,
                         α · CE + (1 − α) · T² · KL, is (1 − α) times forward_kl_loss(…, tokens=labels, temperature=T,
                         squared_temperature=True, hard_coef=α / (1 − α)).loss.
    mask                 [...], bool or weights ≥ 0.
    vocab_size           Leaves out the ids from this one on, in both distributions. For two heads of one tokenizer that are
                         padded to different sizes (Qwen2.5: 151936 and 152064 for 151665 ids).
    teacher_temperature  Default: the student's.
    squared_temperature  True: multiplies the loss by temperature² (Hinton et al., 2015). The learning rate can do the same.
    per_token            True: fills `LossOutput.per_token` with the by-products of the same pass, a `PerToken`.
    reduction            "mean", "sum" or "none". `normalizer` is that of `policy_gradient_loss`.
    teacher_bias, teacher_logit_scale, teacher_softcap   As bias, logit_scale and softcap, of the teacher's head.

Metrics, over the tokens that take part: <divergence>_mean, <divergence>_max. They are of the divergence itself: neither
squared_temperature nor the option normalized of jsd_loss multiplies them, and hard_coef adds nothing to them. With a
hard_coef also cross_entropy, the mean of −log p¹.
"""

from __future__ import annotations

from fastkl._loss import divergences
from fastkl._loss.advantages import (
    centred_advantages,
    extrapolated_advantages,
    redistributed_advantages,
    reverse_kl_advantages,
)
from fastkl._loss.cross_entropy import linear_cross_entropy
from fastkl._loss.divergences import *  # noqa: F403  what its __all__ names
from fastkl._loss.numbers import BadNumbers
from fastkl._loss.output import LossOutput, Predictions
from fastkl._loss.policy_gradient import policy_gradient_loss, sampled_reverse_kl_loss
from fastkl._loss.teachers.common import CommonLogits, common_vocabulary_logits
from fastkl._loss.teachers.likeliest import TopK, linear_list_logprobs, linear_ranks, linear_top_k
from fastkl._loss.token_stats import TokenStats, linear_logprobs, linear_token_stats
from fastkl._loss.top_k import top_k_kl_loss
from fastkl.kernels.divergence.formula import PerToken
from fastkl.kernels.options import Backward, Sparse
from fastkl.kernels.top_k.sampled import TailPerToken

__all__ = [
    "Backward",
    "BadNumbers",
    "CommonLogits",
    "LossOutput",
    "PerToken",
    "Predictions",
    "Sparse",
    "TailPerToken",
    "TokenStats",
    "TopK",
    "centred_advantages",
    "common_vocabulary_logits",
    "extrapolated_advantages",
    "linear_cross_entropy",
    "linear_list_logprobs",
    "linear_logprobs",
    "linear_ranks",
    "linear_token_stats",
    "linear_top_k",
    "policy_gradient_loss",
    "redistributed_advantages",
    "reverse_kl_advantages",
    "sampled_reverse_kl_loss",
    "top_k_kl_loss",
]
__all__ += divergences.__all__
