"""The tensors of a head as the products take them: of one dtype, cut to the vocabulary, whole or the piece of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from fastkl._loss.heads.shares import Piece

HALVES = (torch.bfloat16, torch.float16)


def operand_dtype(hidden: Tensor, *others: Tensor | None) -> torch.dtype | None:
    """The dtype that hidden, weight and bias are multiplied in; None where they do not go together.

    As `F.linear` has it under autocast (float64 is left alone). Elsewhere float32 gives way to bfloat16 or float16, as
    under an autocast to that dtype.
    """
    dtypes = {tensor.dtype for tensor in (hidden, *others) if tensor is not None}
    device = hidden.device.type
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocasts and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device)
    if len(dtypes) == 1:
        return hidden.dtype
    return next((dtype for dtype in HALVES if dtypes == {torch.float32, dtype}), None)


def operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int | None = None, piece: Piece | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a head that was checked. Gradients come back in the dtype and the sharding of each tensor."""
    dtype = operand_dtype(hidden, weight, bias)
    assert dtype is not None

    def rows(tensor: Tensor) -> Tensor:
        found = first_rows(whole(tensor), vocab_size) if piece is None else piece.own(tensor, vocab_size)
        return found.to(dtype)

    return hidden.to(dtype), rows(weight), None if bias is None else rows(bias)


def first_rows(tensor: Tensor, count: int | None) -> Tensor:
    """The first `count` rows as a view; everything where it is None."""
    return tensor if count is None else tensor[:count]


def is_sharded(tensor: Tensor | None) -> bool:
    """Is it a DTensor? Their module is not imported where nobody has one."""
    return hasattr(tensor, "full_tensor")


def is_packed(tensor: Tensor) -> bool:
    """Has it another format under its dtype, as torchao's quantised weights have? Kernels would read something else."""
    return is_traceable_wrapper_subclass(tensor) and not is_sharded(tensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on each process; other tensors as they are.

    Its gradient is the mean of the processes' gradients, and sharded as the tensor is. That is what FSDP makes of the
    losses of different rows. Processes of a tensor-parallel group have the same rows, and the same gradient.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
