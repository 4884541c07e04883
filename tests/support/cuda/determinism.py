"""Operators that may give other bits from call to call on CUDA, seen on a CPU.

The names on the left are those in the documentation of torch.use_deterministic_algorithms, which lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkl.kernels.operators import library

# Never the same bits: torch raises, or takes a slower algorithm where it is told to.
NEVER: dict[str, tuple[str, ...]] = {
    "torch.nn.Conv1d": ("convolution", "convolution_backward"),
    "torch.nn.Conv2d": ("convolution", "convolution_backward"),
    "torch.nn.Conv3d": ("convolution", "convolution_backward"),
    "torch.nn.ConvTranspose1d": ("convolution", "convolution_backward"),
    "torch.nn.ConvTranspose2d": ("convolution", "convolution_backward"),
    "torch.nn.ConvTranspose3d": ("convolution", "convolution_backward"),
    "torch.nn.ReplicationPad1d": ("replication_pad1d_backward",),
    "torch.nn.ReplicationPad2d": ("replication_pad2d_backward",),
    "torch.nn.ReplicationPad3d": ("replication_pad3d_backward",),
    "torch.nn.ReflectionPad1d": ("reflection_pad1d_backward",),
    "torch.nn.ReflectionPad2d": ("reflection_pad2d_backward",),
    "torch.nn.ReflectionPad3d": ("reflection_pad3d_backward",),
    "torch.nn.AvgPool3d": ("avg_pool3d_backward",),
    "torch.nn.MaxPool3d": ("max_pool3d_with_indices_backward",),
    "torch.nn.AdaptiveAvgPool2d": ("_adaptive_avg_pool2d_backward",),
    "torch.nn.AdaptiveAvgPool3d": ("_adaptive_avg_pool3d_backward",),
    "torch.nn.AdaptiveMaxPool2d": ("adaptive_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool2d": ("fractional_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool3d": ("fractional_max_pool3d_backward",),
    "torch.nn.MaxUnpool1d": ("max_unpool2d",),
    "torch.nn.MaxUnpool2d": ("max_unpool2d",),
    "torch.nn.MaxUnpool3d": ("max_unpool3d",),
    "torch.nn.functional.interpolate": (
        *("upsample_linear1d_backward", "upsample_bilinear2d_backward"),
        *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward"),
    ),
    "torch.nn.functional.grid_sample": ("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    "torch.nn.NLLLoss": ("nll_loss_forward", "nll_loss2d_forward"),
    "torch.nn.CTCLoss": ("_ctc_loss_backward",),
    "torch.nn.EmbeddingBag": ("_embedding_bag_backward", "_embedding_bag_dense_backward"),
    "torch.bmm": (),  # of sparse matrices, of which there are none
    "torch.Tensor.put_": ("put",),
    "torch.histc": ("histc",),
    "torch.Tensor.resize_": (),  # of quantised tensors, of which there are none
    "torch.repeat_interleave": (),  # its derivative adds by index
    "torch.kthvalue": ("kthvalue",),
}
# Where several numbers are added to, or written to, one place, or where floats are added up along a scan.
SOMETIMES: dict[str, tuple[str, ...]] = {
    "torch.cumsum": ("cumsum", "cumprod", "logcumsumexp"),
    "torch.bincount": ("bincount",),
    "torch.median": ("median", "nanmedian"),
    "torch.Tensor.__getitem__": ("index_put", "_index_put_impl", "_unsafe_index_put"),
    "torch.Tensor.index_put": ("index_put", "_index_put_impl", "_unsafe_index_put"),
    "torch.Tensor.scatter_add_": ("scatter_add",),
    "torch.gather": ("scatter_add",),
    "torch.index_add": ("index_add",),
    "torch.index_select": ("index_add",),
    "torch.Tensor.index_copy": ("index_copy",),
    "torch.Tensor.scatter": ("scatter",),
    "torch.Tensor.scatter_reduce": ("scatter_reduce", "index_reduce"),
}
_NEVER = frozenset(name for names in NEVER.values() for name in names)


class RefusesNonDeterminism(TorchDispatchMode):
    """Raises where an operator of torch's list would not give the same bits on CUDA.

    With `values` it looks at indices too, which a fake tensor does not have.
    """

    def __init__(self, values: bool = True) -> None:
        super().__init__()
        self.values = values
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.removesuffix("_")
        self.seen.add(name)
        if name in _NEVER or _scans(name, func, args, kwargs):
            raise RuntimeError(f"{func} is not deterministic on CUDA")
        result = func(*args, **kwargs)
        check = _CHECKS.get(name)
        if check is not None and self.values and not check(func, args, kwargs, result):
            raise RuntimeError(f"{func} writes several times to one place")
        return result


@contextmanager
def refused_non_determinism(monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusesNonDeterminism]:
    """As on CUDA under torch.use_deterministic_algorithms(True), which also fills new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    without_operators(monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        with RefusesNonDeterminism() as mode:
            yield mode
    finally:
        torch.use_deterministic_algorithms(before)


def without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver runs without the torch operators around it, into which a mode does not see."""
    for name in ("_evaluate", "_evaluate_with_gradients"):
        operator: Any = getattr(library, name)
        if hasattr(operator, "_init_fn"):
            monkeypatch.setattr(library, name, operator._init_fn)


def _scans(name: str, func: Any, args: Any, kwargs: Any) -> bool:
    if name in SOMETIMES["torch.cumsum"]:
        return bool((kwargs.get("dtype") or args[0].dtype).is_floating_point)
    if name in SOMETIMES["torch.median"]:
        return bool(func._overloadname.startswith(("dim", "names_dim")))
    return name == "bincount" and ((len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None)


def _index_add(func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
    return not args[3].is_floating_point() or args[2].unique().numel() == args[2].numel()


def _index_copy(func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
    return bool(args[2].unique().numel() == args[2].numel())


def _scatter_add(func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
    target, dim, index, source = args[:4]
    if not source.is_floating_point():
        return True
    times = torch.zeros(target.shape, dtype=torch.int64).scatter_add_(dim, index, torch.ones_like(index))
    return bool((times <= 1).all())


def _scatter(func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
    """Equal numbers may meet."""
    _, dim, index, source = args[:4]
    if not isinstance(source, Tensor):
        return True
    return _same(result.gather(dim, index), source[tuple(slice(size) for size in index.shape)])


def _index_put(func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
    target, indices, values = args[:3]
    if not (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
        written = result[tuple(slice(None) if index is None else index for index in indices)]
        return _same(written, values.expand_as(written))
    times = torch.zeros(target.shape, dtype=torch.int64)
    times.index_put_(tuple(indices), torch.ones((), dtype=torch.int64), accumulate=True)
    return not target.is_floating_point() or bool((times <= 1).all())


def _never(func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:
    return False


def _same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.nan_to_num(nan=-7.0), expected.to(found.dtype).nan_to_num(nan=-7.0))


_CHECKS: dict[str, Callable[[Any, Any, Any, Any], bool]] = {
    "index_add": _index_add,
    "index_copy": _index_copy,
    "scatter_add": _scatter_add,
    "scatter": _scatter,
    **dict.fromkeys(SOMETIMES["torch.Tensor.index_put"], _index_put),
    **dict.fromkeys(SOMETIMES["torch.Tensor.scatter_reduce"], _never),
}
