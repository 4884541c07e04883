"""Kernels that run nowhere: each checks what it is given against the shapes that its source declares."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.variants.aot import kernel_name
from fastkl.kernels.gemm import ROW_MULTIPLE

DECLARED = re.compile(r"^    (\w+): tl\.tensor,  # \[([^\]]+)\]", re.MULTILINE)  # name_ptr: tl.tensor,  # [n, V]
SIZES = {"n": "n", "vocabulary": "V", "dim": "D", "dim_t": "D_t", "splits": "splits"}  # by the names of parameters
LONG, INT, FLOAT = torch.int64, torch.int32, torch.float32
DTYPES = {
    "tokens_ptr": LONG,
    **dict.fromkeys(("ids_ptr", "counts_ptr", "ends_ptr", "count_ptr", "wrong_ptr"), INT),
    **dict.fromkeys(("x_ptr", "x_t_ptr", "out_ptr", "value_ptr", "partials_ptr", "targets_ptr", "weights_ptr"), FLOAT),
    **dict.fromkeys(("x_bias_ptr", "x_t_bias_ptr", "class_weight_ptr", "class_total_ptr", "hard_scale_ptr"), FLOAT),
    **dict.fromkeys(("norms_ptr", "tau_ptr", "inverse_ptr", "excess_ptr", "slope_ptr", "m_ptr", "scale_ptr"), FLOAT),
    **dict.fromkeys(("centre_ptr", "accumulator_ptr", "logprobs_ptr", "ref_ptr", "factor_ptr"), FLOAT),
}  # of the others: the dtype of the operands, as `u` has it


class FakeKernels:
    """In place of every Triton kernel from here on; `launched` are the names of those that were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, operands: torch.dtype) -> None:
        self.launched: list[str] = []
        self.operands = operands

        def run(function: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
            assert not args, "a launch passes every argument by its name"
            self.launched.append(kernel_name(function))
            assert all(isinstance(side, int) and side > 0 for side in grid), grid
            self.check(function, options)

        monkeypatch.setattr(JITFunction, "run", run)

    def check(self, function: Any, given: dict[str, Any]) -> None:
        name = kernel_name(function)
        unknown = given.keys() - set(function.arg_names) - {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}
        assert set(function.arg_names) <= given.keys(), f"{name} lacks {set(function.arg_names) - given.keys()}"
        assert not unknown, f"{name} does not know {unknown}"
        sizes = {symbol: given[parameter] for parameter, symbol in SIZES.items() if parameter in given}
        declared = {parameter: sides.split(", ") for parameter, sides in DECLARED.findall(function.src)}
        for parameter, value in given.items():
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if not isinstance(tensor, Tensor):
                continue
            where = f"{parameter} of {name}, {list(tensor.shape)} of {tensor.dtype}"
            assert tensor.is_cuda, where
            self.check_dtype(name, parameter, tensor, where)
            if parameter in ("x_ptr", "x_t_ptr", "u_ptr"):
                assert tensor.stride(0) % ROW_MULTIPLE["accelerator"] == 0, f"{where}, strides {tensor.stride()}"
            if parameter in declared:
                self.check_shape(declared[parameter], tensor, sizes, where)
                self.check_strides(declared[parameter], parameter, tensor, given, where)

    def check_dtype(self, name: str, parameter: str, tensor: Tensor, where: str) -> None:
        """Of an output the family decides: the sparse backward writes gradients in the dtype of the operands."""
        own = name == "sparse.hidden_gradient" and parameter == "out_ptr"
        expected = self.operands if own else DTYPES.get(parameter, FLOAT if "value" in parameter else self.operands)
        if parameter not in DTYPES and name.startswith("divergence.") and parameter != "u_ptr":
            expected = FLOAT  # by-products
        assert tensor.dtype == expected, f"{where}; expected {expected}"

    @staticmethod
    def check_shape(sides: list[str], tensor: Tensor, sizes: dict[str, int], where: str) -> None:
        """A number is the least that there may be; a name is one size in all of a launch."""
        assert len(sides) == tensor.dim(), where
        for side, size in zip(sides, tensor.shape, strict=True):
            if side[0].isdigit():
                assert size >= int(side.split(" ")[0]), where
            else:
                assert sizes.setdefault(side, size) == size, f"{where}: {side} is {sizes[side]}"

    @staticmethod
    def check_strides(sides: list[str], parameter: str, tensor: Tensor, given: dict[str, Any], where: str) -> None:
        """Distances that a kernel is told are the tensor's; where it is told none, it takes the tensor to be dense."""
        base = parameter.removesuffix("_ptr")
        axes = {"row": sides.index("n") if "n" in sides else 0, "value": 0, "column": len(sides) - 1}
        told = {axis: given[key] for word, axis in axes.items() if (key := f"{base}_stride_{word}") in given}
        if (key := f"{base}_stride") in given:
            told[0] = given[key]
        for axis, stride in told.items():
            assert stride == tensor.stride(axis), f"{where}, strides {tensor.stride()}"
        untold = tensor
        for axis in sorted(told, reverse=True):
            untold = untold.select(axis, 0)
        assert untold.is_contiguous(), f"{where}, strides {tensor.stride()}"
