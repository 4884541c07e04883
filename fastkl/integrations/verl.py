"""fastkl under verl's fused head.

    from fastkl.integrations.verl import use

    use()  # in each process that trains

With `use_fused_kernels=True` and the torch backend, log-probs and entropies then come from `fastkl.loss`: what the policy
losses and the distillation losses k1, k2, k3, … of verl are made of. docs/integrations.md says how Ray's workers load it.
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

try:
    import verl
except ImportError as error:
    raise ImportError(f"fastkl.integrations.verl needs verl 0.9 ({error}): pip install verl") from error

from fastkl.integrations.bindings import Part, put_in_place
from fastkl.loss import linear_token_stats

__all__ = ["use"]


def use() -> ExitStack:
    """Puts fastkl in the place of `FusedLinearForPPOFunction`. A second call changes nothing.

    Returns what undoes it: `use().close()`, or the end of `with use():`.

    Raises RuntimeError, and changes nothing, if the installed verl is not built as this needs.
    """
    return put_in_place("verl", f"verl {verl.__version__}", "verl 0.9.1", _PARTS)


def _log_probs_and_entropies(
    hidden_states: Tensor,  # [..., D]
    vocab_weights: Tensor,  # [V, D]
    input_ids: Tensor,  # [...], the ids to score
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """Log-probs [...] in float32, and entropies [...] in the dtype of the hidden states."""
    stats = linear_token_stats(hidden_states, vocab_weights, input_ids, temperature=temperature)
    return stats.logprobs, stats.entropies.to(hidden_states.dtype)


_PARTS = (Part("verl.utils.experimental.torch_functional", "FusedLinearForPPOFunction", _log_probs_and_entropies),)
