"""The logits product with the row pass in its epilogue, in Triton: values and gradients without fp32 logits in memory.

For the negative log-prob of tokens whose log-prob is nearly known beforehand, as the sampler's is. With s, scale and
c = scale · log₂ e as in `score/triton.py`, and ref near lse / scale:

    reference     ref = s[y] − logprob / scale                 one row of the weight for each token, 2·n·D operations
    product       e = 2^(c (s − ref)),  u = e · dz/dx          leaves in the gradient's dtype, 2 bytes in place of 4 + 8 + 2
    merge         l = Σ e               out[0] = scale (ref − s[y]) + log l
                  u[y] = (e[y] − l) · dz/dx                    and 1 / l goes to the thin side, with the slopes

Whatever ref is, the values are exact: it only moves e. It is wrong where l is too large or too small for the gradient's
dtype (`REACH`), or has overflowed, or is 0. Such a row gets ref + log l / scale, or the largest s where l says nothing,
and its tile of rows is computed again: the other programs of that launch end at once. The host does not wait to know.
What is undefined, NaN, stays.

The entry of the token, about −l, would be rounded by 2⁻⁹ in bfloat16, while −1 + p[y] for a small p[y] is hardly
rounded. So l is replaced on the thin side by l' = e[y] − u[y], which makes the rounded entry exact. Then u / l' is
p / (1 + δ) − 1[y] with |δ| ≤ 2⁻⁹ (1 − p[y]): its error is δ p, no more than the rounding of the other entries, and it
still sums to 0.

Same bits for a row wherever it stands, as in `score/triton.py`, whose schedule this is.

Not measured. 2 bytes of each logit go out and come in again; with a vendor's product and a row pass 4 go out, 8 come in,
2 go out and come in. It is worth it where Triton's product is nearly as fast as the vendor's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastkl.kernels.epilogue.triton_kernels import merge_kernel, product_kernel, reference_kernel
from fastkl.kernels.launch import LaunchConfig, launch, register_limit, target_of, token_ids
from fastkl.kernels.score.triton import Head, check_head, descriptor, group_of, head_arguments, plan, scale_of, splits

COLUMNS = 128  # of a tile at most: what it is stored from has no room beside a wider product
NARROW_COLUMNS = 64  # where that has a pointer for each pair of entries
ROOM = 64  # columns that may be written beyond the vocabulary, up to a multiple of this
REFERENCE = LaunchConfig(block_n=1024)
MERGE = LaunchConfig(block_m=16)
# |log l| up to which u keeps its digits, and how often a tile may be computed. The second ref may be the largest s, from
# which float16 has a third.
REACH = {torch.float32: 40.0, torch.bfloat16: 40.0, torch.float16: 1.0}
TRIES = {torch.float32: 2, torch.bfloat16: 2, torch.float16: 3}


def token_nll(head: Head, tokens: Tensor, logprobs: Tensor, out: Tensor, u: Tensor) -> Tensor:
    """out[0] = lse(z) − z[y]; its gradient by the scaled scores is factor · u, for the factor [n] that is returned.

    logprobs [n] float32: about −out[0]. out [1, n] float32. u [n, V] in float32 or 16 bits.
    """
    check_head(head)
    n, vocabulary, device = head.hidden.shape[0], head.weight.shape[0], out.device
    factor = out.new_empty(n)
    if n == 0:
        return factor
    access, config = plan([head], u)
    by_pointer = access != "descriptors" and target_of(device).backend == "cuda"
    config = config._replace(block_n=min(config.block_n, NARROW_COLUMNS if by_pointer else COLUMNS))
    count, width = splits(vocabulary, config.block_n)
    rows = {
        "targets_ptr": out.new_empty(n),
        "ref_ptr": _reference(head, tokens, logprobs),
        "u_stride_row": u.stride(0),
        "partials_ptr": out.new_empty(2, count, n),
        "n": n,
        "vocabulary": vocabulary,
        "splits": count,
        "scale": scale_of(head),
        **token_ids(tokens),
    }
    wrong = torch.empty(n, dtype=torch.int32, device=device)
    for again in range(TRIES[u.dtype]):
        launch(
            product_kernel,
            (triton.cdiv(n, config.block_m) * count,),
            config,
            device,
            wrong_ptr=wrong if again else None,
            u=descriptor(u, config.block_m, config.block_n) if access == "descriptors" else u,
            room=min(u.stride(0), triton.cdiv(vocabulary, ROOM) * ROOM),
            width=width,
            group=group_of([head], config),
            TMA=access == "descriptors",
            **head_arguments(head, access, config),
            **rows,
            **register_limit(device, config.num_warps, 1),
        )
        launch(
            merge_kernel,
            (triton.cdiv(n, MERGE.block_m),),
            MERGE,
            device,
            wrong_ptr=wrong,
            u_ptr=u,
            factor_ptr=factor,
            out_ptr=out,
            out_stride_row=out.stride(1),
            reach=REACH[u.dtype],
            CAPPED=head.options.cap is not None,
            SPLITS=triton.next_power_of_2(count),
            **rows,
            **register_limit(device, MERGE.num_warps, 2),
        )
    return factor


def _reference(head: Head, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """ref [n]."""
    hidden, weight = head.hidden, head.weight
    ref = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    arguments: dict[str, Any] = {
        "h_ptr": hidden,
        "h_stride_row": hidden.stride(0),
        "w_ptr": weight,
        "w_stride_row": weight.stride(0),
        "bias_ptr": head.bias,
        "logprobs_ptr": logprobs,
        "logprobs_stride": logprobs.stride(0),
        "ref_ptr": ref,
        "alpha": head.options.alpha,
        "scale": scale_of(head),
        "vocabulary": weight.shape[0],
        "dim": hidden.shape[1],
        "CAPPED": head.options.cap is not None,
        **token_ids(tokens),
    }
    launch(reference_kernel, (hidden.shape[0],), REFERENCE, hidden.device, **arguments)
    return ref
