"""What the head says of each token, differentiable one by one (`fastkl.loss`)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss.options import LogprobOptions, TokenStatsOptions, takes
from fastkl._loss.output import is_likeliest
from fastkl._loss.rows import flat_call
from fastkl.kernels.operators.autograd import row_losses, token_values
from fastkl.kernels.problem import Problem, RowLoss


class TokenStats(NamedTuple):
    """One entry per token, 0 or False at ignored ones. float32 (float64 for float64) but for `top1`."""

    logprobs: Tensor  # log p of the token, nats
    entropies: Tensor  # −Σ p log p, nats
    lse: Tensor  # logsumexp(z): logprobs + lse is the token's logit
    top1: Tensor  # bool: no other token has a greater logit, nor is one NaN


@takes(LogprobOptions)
def linear_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    **options: Unpack[LogprobOptions],
) -> Tensor:
    """Log-probs of `tokens`, float32 (float64 for float64), of their shape; 0 at ignored ones.

    Differentiable in hidden, weight and bias. Equals
    `torch.log_softmax(z, -1).gather(-1, tokens[..., None]).squeeze(-1)`. Any loss can be built on it: the gradient honours
    each token's own upstream value. With a frozen head the backward pass is one product over [N, D]; with a trainable one
    it forms the logits a second time, which `policy_gradient_loss` and a sparse backward avoid.

    It returns a tensor and no metrics: of a sparse backward `policy_gradient_loss` has them.

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    call = flat_call(hidden, weight, tokens, options, "token_nll")
    problem = Problem(call.inputs, call.spec, RowLoss(call.token_weights), call.rows())
    nll = row_losses(problem, call.weight_grad).losses
    return (-nll).where(call.active, 0.0).reshape(call.shape)


@takes(TokenStatsOptions)
def linear_token_stats(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    **options: Unpack[TokenStatsOptions],
) -> TokenStats:
    """Log-probs of `tokens`, entropies and lse [...], each with a gradient, and whether a token is the likeliest.

    With log_p = torch.log_softmax(z, -1) they equal

        logprobs    log_p.gather(-1, tokens[..., None]).squeeze(-1)
        entropies   -(log_p.exp() * log_p).sum(-1)
        lse         torch.logsumexp(z, -1)
        top1        z.gather(-1, tokens[..., None]).squeeze(-1) == z.amax(-1)

    Every id of the largest logit is the likeliest; `z.argmax(-1) == tokens` would take the first alone. Any loss can be
    built on the first three: gradients honour each token's own upstream values, of one of them or of all.

    vocab_size     Ids from this one on, a head's padding, are left out as if they did not exist.
    entropy_grad   False: `entropies` are detached. Of a frozen head that saves a third, where entropies are only looked at.

    Cost in GEMMs over the vocabulary: 1 without gradients. With a frozen head 3, and 2 under entropy_grad=False. With a
    trainable weight or bias 4. None is made for gradients until backward is called, but under entropy_grad=False, where
    the forward pass makes both. The other arguments are those of all losses (`fastkl.loss`).

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    call = flat_call(hidden, weight, tokens, options, "token_nll_entropy")
    problem = Problem(call.inputs, call.spec, RowLoss(call.token_weights), call.rows())
    nll, entropies, lse, gap = token_values(problem, call.weight_grad, options["entropy_grad"])
    top1 = (is_likeliest(gap, lse) & call.active).reshape(call.shape)
    logprobs, entropies, lse = (t.where(call.active, 0.0).reshape(call.shape) for t in (-nll, entropies, lse))
    return TokenStats(logprobs, entropies, lse, top1)
