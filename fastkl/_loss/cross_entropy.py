"""Cross-entropy with target tokens (`fastkl.loss`)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.numbers import visible
from fastkl._loss.options import CrossEntropyOptions, record, takes
from fastkl._loss.output import LossOutput, Predictions, is_likeliest, masked_mean, sparse_metrics
from fastkl._loss.rows import Call, flat_call, reduced_loss
from fastkl.kernels.options import CrossEntropy
from fastkl.kernels.problem import RowLoss


@takes(CrossEntropyOptions)
def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64
    **options: Unpack[CrossEntropyOptions],
) -> LossOutput:
    """Cross-entropy of a head with target ids: every gradient comes out of one pass over the chunks.

    Equals `F.cross_entropy(z, targets, weight=class_weight, label_smoothing=label_smoothing)` per token, times the mask:

        (1 − ε) c[y] (−log p[y]) + ε/V Σ_v c[v] (−log p[v]) + z_loss · lse²        ε = label_smoothing, c = class_weight

    targets           [...], int64 ids. Position t of a causal model predicts token t + 1: hidden[:, :-1], labels[:, 1:].
    label_smoothing   in [0, 1]. Soft-cap and class weights go with it.
    z_loss            ≥ 0. Adds z_loss · logsumexp(z)² to each token, which no class weight multiplies (PaLM, Chowdhery et
                      al. 2022; Liger's lse_square_scale).
    class_weight      [V], or one for each of the vocab_size ids; real, ≥ 0.
    mask              [...], bool or weights ≥ 0.
    vocab_size        Ids from this one on, a head's padding, are left out; V is then this number.
    reduction         "mean", "sum" or "none". The mean divides by what F.cross_entropy divides by: the sum of c[y], times
                      the mask, over tokens that are not ignored. The z-loss has a divisor of its own, the sum of the mask.
                      A mean over nothing is 0, where F.cross_entropy gives NaN.
    normalizer        the divisor of the mean in place of those, a number or a 0-dim tensor: the *global* count of tokens
                      under gradient accumulation or on several ranks (`num_items_in_batch` of Transformers).
    per_token         True: fills `LossOutput.per_token` with the `Predictions` of the same pass.

    Cost in GEMMs over the vocabulary: 3, and 2 with a frozen head; 1 without gradients. reduction="none" has 4 with a
    trainable head, for its upstream gradients are not known inside. Under label smoothing every id has a gradient, so that
    a sparse backward uses more of them. The other arguments are those of all losses (`fastkl.loss`).

    Metrics, over the tokens that take part, weighted by nothing: cross_entropy, the mean of −log p[y]; accuracy, the share
    of targets that no other token has a greater logit than; z_loss, the mean of what it adds, if it is not 0.

    Raises TypeError or ValueError for arguments that do not fit, before anything is computed.
    """
    terms = record(CrossEntropy, options)
    call = flat_call(hidden, weight, targets, options, "cross_entropy", tokens_name="targets")
    class_weight = _class_weight(options["class_weight"], call)
    count, weights = call.token_weights.sum(), call.token_weights
    if class_weight is not None and call.inputs.tokens is not None:
        of_targets = class_weight[call.inputs.tokens]
        if call.reduction.kind == "mean" and call.reduction.normalizer is None:
            # The z-loss has another divisor. With class weights that are 1 in the mean over targets both have one.
            total = (weights * of_targets).sum()
            scale = torch.where(total > 0, count / total, 0.0)
            class_weight, of_targets = class_weight * scale, of_targets * scale
        if terms == CrossEntropy():
            class_weight, weights = None, weights * of_targets
    spec = call.spec._replace(cross_entropy=terms, extras=options["per_token"])
    call = call._replace(inputs=call.inputs._replace(class_weight=class_weight), spec=spec)
    loss, values, statistics = reduced_loss(call, RowLoss(weights), call.rows(), count)
    _, nll, lse, gap, *ids = values.where(call.active, 0.0)
    right = is_likeliest(gap, lse).to(nll.dtype)
    metrics = {"cross_entropy": masked_mean(nll, call.active), "accuracy": masked_mean(right, call.active)}
    if terms.z_loss != 0.0:
        metrics["z_loss"] = masked_mean(terms.z_loss * lse.square(), call.active)
    per_token = None
    if ids:
        likeliest = ids[0].to(torch.int64).where(call.active, -1)
        per_token = Predictions(likeliest.reshape(call.shape), lse.reshape(call.shape))
    return LossOutput(loss, (-nll).reshape(call.shape), {**metrics, **sparse_metrics(statistics)}, per_token)


def _class_weight(class_weight: Tensor | None, call: Call) -> Tensor | None:
    """One for each id in the compute dtype, detached, cut to the vocabulary of the call."""
    if class_weight is None:
        return None
    check.check_tensor("class_weight", class_weight)
    if class_weight.shape not in ((call.all_ids,), (call.vocabulary,)):
        raise ValueError(
            f"class_weight is {list(class_weight.shape)} but weight has {call.all_ids} ids: expected one for each id, "
            f"[{call.all_ids}]"
        )
    if class_weight.is_complex():
        raise TypeError(f"class_weight is {class_weight.dtype}; expected real numbers")
    check.check_device("class_weight", class_weight, call.inputs.weight, "weight")
    class_weight = class_weight.detach()[: call.vocabulary].to(call.token_weights.dtype)
    if visible(class_weight) and not bool(((class_weight >= 0) & (class_weight < torch.inf)).all()):
        raise ValueError("class_weight holds a weight that is negative or not finite; weights are >= 0")
    return class_weight.contiguous()
