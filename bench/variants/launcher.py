"""A launcher of Triton kernels and the variants in which they are compiled: as data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BOTH = (False, True)
WIDTHS = (151936, 50257)  # a multiple of 16, with vectorised loads, and an odd one
CUT = 151665  # an odd one whose rows lie as the driver's workspace has them: vectorised as well

Options = dict[str, Any]


class Launcher(NamedTuple):
    """A function that launches one kernel or more, and what they may be asked for."""

    kernel: str  # the first that it launches, as folder.function
    call: Callable[
        ..., object
    ]  # call(n, offset, **options): for n rows, what there is per row `offset` into its buffers
    variants: Sequence[Options]
    representative: Sequence[Options]  # those compiled on every test run
    programs: int = 2  # how many must fit a multiprocessor at a time, by their registers
    multiplies: bool = False


class Variant(NamedTuple):
    launcher: Launcher
    options: Options

    @property
    def kernel(self) -> str:
        return self.launcher.kernel

    @property
    def config(self) -> str:
        """What is special about this variant."""
        return "-".join(word for name, value in self.options.items() for word in _words(name, value))

    @property
    def representative(self) -> bool:
        return self.options in self.launcher.representative

    def launch(self, n: int = 2, offset: int = 0) -> None:
        """Calls the launcher with tensors on a CPU."""
        self.launcher.call(n, offset, **self.options)

    def but(self, **options: Any) -> Variant:
        return Variant(self.launcher, self.options | options)


def chunk(n: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [n, V], side by side but for `CUT`."""
    length = -(-vocabulary // 64) * 64 if vocabulary == CUT else vocabulary
    return torch.zeros(n, length, dtype=dtype)[:, :vocabulary]


def grid(**axes: Sequence[Any]) -> list[Options]:
    """Every combination of the options' values."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _words(name: str, value: object) -> list[str]:
    if isinstance(value, tuple):
        return [word for part in value for word in _words(name, part)]
    if isinstance(value, bool):
        return [name] * value
    return [str(value).removeprefix("torch.")]
