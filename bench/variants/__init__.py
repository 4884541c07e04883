"""What the Triton kernels are compiled for: every way in which a launch may differ and need a kernel of its own.

A family of kernels lists its launchers in a file of this folder. `bench kernels` and the tests take the variants from here.
"""

from __future__ import annotations

from bench.variants import divergence, epilogue, rows, score, sparse
from bench.variants.launcher import Launcher, Variant

LAUNCHERS: list[Launcher] = [
    *rows.LAUNCHERS,
    *divergence.LAUNCHERS,
    *score.LAUNCHERS,
    *sparse.LAUNCHERS,
    *epilogue.LAUNCHERS,
]
VARIANTS: list[Variant] = [Variant(launcher, options) for launcher in LAUNCHERS for options in launcher.variants]


def variant(kernel: str, **options: object) -> Variant:
    """A representative variant of a kernel, or another one by its differences."""
    launcher = next(launcher for launcher in LAUNCHERS if launcher.kernel == kernel)
    return Variant(launcher, launcher.representative[0]).but(**options)
