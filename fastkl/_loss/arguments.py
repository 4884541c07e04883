"""What the public losses accept: every check names the argument, what it got, and the remedy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkl._loss import hints
from fastkl._loss.heads.operands import is_packed, is_sharded, operand_dtype
from fastkl._loss.numbers import visible
from fastkl.kernels.backend import BACKENDS
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.options import Backward, Sparse
from fastkl.kernels.problem import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, who: str = "", *, part: bool = False) -> None:
    """Shapes, dtypes and devices of one head; `who` prefixes the argument names ("student_", "teacher_", "").

    The rows of one process, a `part`, may be none.
    """
    bias_name = "bias" if who == "student_" else f"{who}bias"
    for name, tensor in ((f"{who}hidden", hidden), (f"{who}weight", weight), (bias_name, bias)):
        if tensor is None and name == bias_name:
            continue
        given = check_tensor(name, tensor)
        if given.dtype not in DTYPES:
            raise TypeError(f"{name} is {given.dtype}; use float32, bfloat16, float16 or float64")
        if is_packed(given):
            raise TypeError(
                f"{name} is a {type(given).__name__}, which holds its numbers in a format of its own; give a plain "
                f"tensor, as {name}.dequantize() may, or leave the head out of quantisation"
            )
    _refuse_forward_mode(hidden, weight)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{who}hidden {list(hidden.shape)} does not fit {who}weight {list(weight.shape)}: expected "
            f"[..., D] and [V, D] (the LM head's weight as torch.nn.Linear keeps it){hints.of_head(hidden, weight, who)}"
        )
    if weight.shape[0] == 0 and not part:
        raise ValueError(f"{who}weight {list(weight.shape)} has an empty vocabulary")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{bias_name} {list(bias.shape)} does not fit {who}weight {list(weight.shape)}: expected [V]")
    for name, tensor in ((f"{who}weight", weight), (bias_name, bias)):
        if tensor is None:
            continue
        check_device(name, tensor, hidden, f"{who}hidden")
    if is_sharded(hidden):
        raise TypeError(f"{who}hidden is a DTensor; give the rows of this process, {who}hidden.to_local()")
    if operand_dtype(hidden, weight, bias) is None:
        third = "" if bias is None else f" and {bias_name} is {bias.dtype}"
        raise TypeError(
            f"{who}hidden is {hidden.dtype}, {who}weight is {weight.dtype}{third}; cast them to one dtype, or call under "
            f"torch.autocast (float32 alone goes with bfloat16 or float16, and takes its dtype)"
        )


def check_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}{hints.of_type(value)}")
    return value


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """A tangent would be lost in silence: the losses have gradients in reverse mode alone."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "fastkl losses have no forward-mode derivative (torch.func.jvp, forward_ad): use backward or "
            "torch.autograd.grad (fastkl.reference has each loss in plain PyTorch, which has one)"
        )


def check_integers(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} is {tensor.dtype}; expected integers")


def check_real(name: str, value: Any) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.is_complex():
        raise TypeError(f"{name} is {tensor.dtype}; expected real numbers")
    return tensor


def check_floats(name: str, logprobs: Tensor) -> None:
    if not logprobs.is_floating_point():
        raise TypeError(f"{name} is {logprobs.dtype}; expected floating-point log-probs")


def check_number(name: str, value: Any, whole: bool = False) -> None:
    """A number, of NumPy's or a tensor's too; a gradient of it would be lost in silence."""
    if not isinstance(value, int if whole else (int, float)) and not hasattr(
        value, "__index__" if whole else "__float__"
    ):
        raise TypeError(f"{name} is {value!r}; expected a {'whole ' if whole else ''}number")
    if isinstance(value, (int, float)):
        return
    shape, is_tensor = getattr(value, "shape", ()), isinstance(value, Tensor)
    if value.numel() != 1 if is_tensor else len(shape) > 0:
        what = f"{'a tensor' if is_tensor else 'an array'} {list(shape)}"
        raise TypeError(f"{name} is {what}; expected a single number, which holds for all tokens")
    if not is_tensor:
        return
    if value.is_complex() or (whole and value.is_floating_point()):
        raise TypeError(f"{name} is {value.dtype}; expected a {'whole' if whole else 'real'} number")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, and the losses have none for it: pass it detached")


def check_finite(name: str, number: float) -> None:
    check_number(name, number)
    if not -float("inf") < number < float("inf"):
        raise ValueError(f"{name} is {number}; it must be finite")


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} but {like_name} is on {like.device}; move one of them")


def check_per_token(name: str, tensor: Tensor, hidden: Tensor) -> Tensor:
    """A real-valued tensor with one entry per token, detached."""
    check_real(name, tensor)
    if tensor.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} is {list(tensor.shape)} but hidden is {list(hidden.shape)}: expected one entry per token, "
            f"{list(hidden.shape[:-1])}{hints.of_tokens(name, tensor, hidden)}"
        )
    check_device(name, tensor, hidden, "hidden")
    return tensor.detach()


def check_tokens(
    tokens: Tensor,
    hidden: Tensor,
    vocabulary: int,
    ignore_index: int,
    name: str = "tokens",
    active: Tensor | None = None,  # bool [N]; what is left out may be any id
) -> Tensor:
    """Token ids [...] as int64. On an accelerator ids outside the vocabulary are left to the row functions:
    looking at them here would stall the device, and in a compiled graph nothing can be raised."""
    tokens = check_per_token(name, tokens, hidden)
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"{name} is {tokens.dtype}; expected integer token ids (torch.int64)")
    tokens = tokens.to(torch.int64)
    if visible(tokens):
        wrong = ((tokens < 0) | (tokens >= vocabulary)) & (tokens != ignore_index)
        if active is not None:
            wrong = wrong & active.reshape(wrong.shape)
        if bool(wrong.any()):
            raise ValueError(
                f"{name} holds the id {int(tokens[wrong][0])}, outside the vocabulary (0 … {vocabulary - 1}) "
                f"and not ignore_index ({ignore_index}); are the tokenizer and the model of one family?"
            )
    return tokens


def check_list(name: str, value: Any, hidden: Tensor) -> Tensor:
    """k entries for each token, [..., k]."""
    tensor = check_tensor(name, value)
    if tensor.dim() != hidden.dim() or tensor.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name} is {list(tensor.shape)} but hidden is {list(hidden.shape)}: expected k entries per token, "
            f"{[*hidden.shape[:-1], 'k']}"
        )
    check_device(name, tensor, hidden, "hidden")
    return tensor


def check_listed_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    """Ids of lists, or −1. On an accelerator nobody looks."""
    if not visible(ids):
        return
    wrong = (ids < -1) | (ids >= vocabulary)
    if bool(wrong.any()):
        raise ValueError(f"{name} holds {int(ids[wrong][0])}, outside the vocabulary (0 … {vocabulary - 1}; −1 pads)")


def check_hard_coef(hard_coef: float, tokens: Tensor | None) -> None:
    if not 0.0 <= hard_coef < float("inf"):
        raise ValueError(
            f"hard_coef is {hard_coef}; it must be >= 0 and finite, the factor of the tokens' cross-entropy"
        )
    if tokens is None:
        raise ValueError(f"hard_coef is {hard_coef} and needs the tokens of the cross-entropy: pass tokens=")


def check_vocab_size(vocab_size: int, sizes: dict[str, int]) -> None:
    """`sizes`: the vocabularies that are to be cut, by name."""
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 1 <= vocab_size <= min(sizes.values()):
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"vocab_size is {vocab_size!r}; it must be an int in 1 … the smallest vocabulary ({listed})")


def check_plan(backend: Backend, chunk_size: int | None, weight: Tensor, weight_grad: Tensor | None) -> None:
    """What says how the work is done: backend, chunk_size, weight_grad."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size is True or chunk_size < 1):
        raise ValueError(
            f"chunk_size is {chunk_size!r}; it must be a whole number of at least 1, or None for the default"
        )
    if weight_grad is None:
        return
    check_tensor("weight_grad", weight_grad)
    if torch.compiler.is_compiling():
        raise ValueError(
            "weight_grad is written to in the backward pass, which torch.compile does not take: leave it out"
        )
    if not weight.requires_grad:
        raise ValueError("weight_grad is given but weight does not require a gradient: leave weight_grad out")
    if is_sharded(weight):
        raise ValueError(
            "weight_grad is given but weight is a DTensor, whose gradient is sharded: leave weight_grad out"
        )
    if weight_grad.shape != weight.shape or weight_grad.dtype != compute_dtype(weight.dtype):
        raise ValueError(
            f"weight_grad is {list(weight_grad.shape)} of {weight_grad.dtype}; expected {list(weight.shape)} of "
            f"{compute_dtype(weight.dtype)}, the dtype that gradients of {weight.dtype} weights are summed in"
        )
    check_device("weight_grad", weight_grad, weight, "weight")


def sparse(backward: Backward) -> Sparse | None:
    """None for an exact backward pass."""
    if isinstance(backward, Sparse):
        return backward
    if backward != "exact":
        raise ValueError(f'backward is {backward!r}; use "exact" or Sparse(seed=…), from fastkl.loss')
    return None


class Reduction(NamedTuple):
    kind: str
    normalizer: Tensor | float | None  # of a mean; None: what the call itself counts

    def factor(self, count: Tensor) -> Tensor | float:
        """What the sum over tokens is multiplied by; `count` 0-dim is the divisor of its own call. No synchronisation.

        A normalizer of 0 is right where nothing counts. Elsewhere it is NaN, as what is below 0: never an infinity.
        """
        if self.kind == "sum":
            return 1.0
        if isinstance(self.normalizer, Tensor):
            divisor = self.normalizer.to(torch.promote_types(count.dtype, torch.float32))
            nothing = (divisor == 0) & (count == 0)
            return torch.where(divisor > 0, 1.0 / divisor, torch.where(nothing, 0.0, torch.nan))
        if self.normalizer is not None:
            return 1.0 / self.normalizer
        return torch.where(count > 0, 1.0 / count, 0.0)

    def check_count(self, count: Tensor) -> None:
        """Refuses a normalizer of 0 where something counts, if both can be seen."""
        if not isinstance(self.normalizer, Tensor) or not visible(self.normalizer) or not visible(count):
            return
        if bool(self.normalizer == 0) and bool(count > 0):
            raise ValueError(
                f"normalizer is 0, but this call counts {float(count):g}; it must be the global count, this call's included"
            )


def check_reduction(
    reduction: str,
    normalizer: Tensor | float | None,
    hidden: Tensor,
    known: tuple[str, ...] = ("mean", "sum", "none"),
) -> Reduction:
    if reduction not in known:
        raise ValueError(f"reduction is {reduction!r}; use one of {', '.join(known)}")
    if normalizer is None:
        return Reduction(reduction, None)
    if not reduction.endswith("mean"):
        raise ValueError(f'normalizer is given but reduction is {reduction!r}; a normalizer is the divisor of a "mean"')
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer is {list(normalizer.shape)}; expected a number or a 0-dim tensor")
        if normalizer.is_complex() or (visible(normalizer) and not bool(normalizer >= 0)):
            raise ValueError(f"normalizer is {normalizer.item()}; it must be > 0 (the global count)")
        if normalizer.device.type != "cpu":  # a number on the CPU goes with every device
            check_device("normalizer", normalizer, hidden, "hidden")
        return Reduction(reduction, normalizer.detach())
    check_number("normalizer", normalizer)
    if not normalizer > 0:
        raise ValueError(f"normalizer is {normalizer}; it must be > 0 (the global count)")
    return Reduction(reduction, float(normalizer))


def mask_weights(mask: Tensor | None, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of each token, flat [N]: 1 without a mask; a bool mask as 0 and 1."""
    if mask is None:
        return hidden.new_ones(hidden.shape[:-1].numel(), dtype=dtype)
    weights = check_per_token("mask", mask, hidden).reshape(-1).to(dtype)
    check_weights(weights)
    return weights


def check_weights(mask: Tensor) -> None:
    """On an accelerator nobody looks."""
    if visible(mask) and not bool(((mask >= 0) & (mask < torch.inf)).all()):
        raise ValueError(
            "mask holds a weight that is negative or not finite; weights are >= 0, and 0 leaves a token out"
        )


def per_token(advantages: Tensor, shape: torch.Size) -> Tensor:
    """One for each row along the last dimension, [B] or [B, 1], as one for each token; all others as they are."""
    rows = shape[:-1], (*shape[:-1], 1)
    if len(shape) == 0 or advantages.shape == shape or advantages.shape not in rows:
        return advantages
    return advantages.reshape(*shape[:-1], 1).expand(shape)
