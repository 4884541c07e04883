"""What the arguments of `python -m bench` look like."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from bench.lib.measure import CLOCKS
from fastkl._check.json_file import writable

AXES = ("N", "D", "V")
SMALLEST = (1, 1, 16)

Shape = tuple[int, int, int]  # N, D, V


def shape(text: str) -> Shape:
    sizes = _integers(text)
    if len(sizes) != len(AXES):
        raise argparse.ArgumentTypeError(f"{text!r} is not N,D,V; write three integers, as in 1536,576,49152")
    if any(size < least for size, least in zip(sizes, SMALLEST, strict=True)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is too small; N,D,V must be at least {','.join(map(str, SMALLEST))}"
        )
    return sizes[0], sizes[1], sizes[2]


def sweep(text: str) -> tuple[str, list[int]]:
    axis, _, values = text.partition("=")
    sizes = _integers(values)
    if axis not in AXES or not sizes:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no sweep; write an axis of N, D, V and sizes, as in N=256,512,1024"
        )
    least = SMALLEST[AXES.index(axis)]
    if min(sizes) < least:
        raise argparse.ArgumentTypeError(f"{text!r} has {axis} = {min(sizes)}; it must be at least {least}")
    return axis, sizes


def swept(base: Shape, sweeps: list[tuple[str, list[int]]]) -> list[Shape]:
    """The shapes to measure: `base`, or instead of it `base` with one size replaced by each of its axis's sweeps."""
    shapes = [base] if not sweeps else []
    for axis, sizes in sweeps:
        for size in sizes:
            n, d, v = (size if name == axis else unchanged for name, unchanged in zip(AXES, base, strict=True))
            shapes.append((n, d, v))
    return list(dict.fromkeys(shapes))


def names(thing: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an argument that names some of what is `known`, with commas between."""

    def chosen(text: str) -> list[str]:
        listed = [name.strip() for name in text.split(",") if name.strip()]
        for name in listed:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {thing} {name!r}; use some of {', '.join(known)}")
        if not listed:
            raise argparse.ArgumentTypeError(f"names no {thing}; use some of {', '.join(known)}")
        return list(dict.fromkeys(listed))

    return chosen


def add_names(
    parser: argparse.ArgumentParser, flag: str, thing: str, known: Sequence[str], does: str, default: Sequence[str] = ()
) -> None:
    """An option that names some of `known`: the `default`, or else all of them, where it is left out."""
    parser.add_argument(
        flag,
        type=names(thing, known),
        default=list(default or known),
        metavar="A,B",
        help=f"{does}{'' if default else ', all by default'}: {', '.join(known)}",
    )


def device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; use cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device here; use --device cpu")
    return text


def add_json(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument("--json", type=writable, metavar="FILE", help=f"write the report to FILE{when}")


def add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="measure wall seconds, or processor seconds on a machine that others use too (default: wall)",
    )


def check_clock(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.device == "cuda" and arguments.clock == "cpu":
        parser.error("argument --clock: cpu says nothing of a GPU; leave it at wall with --device cuda")


def sizes(text: str) -> list[int]:
    listed = _integers(text)
    if not listed or min(listed) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes; write whole numbers >= 1, as in 128,256")
    return listed


def indices(text: str) -> list[int]:
    listed = _integers(text)
    if not listed or min(listed) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of indices; write whole numbers >= 0, as in 14,15")
    return sorted(set(listed))


def fractions(text: str) -> list[float]:
    try:
        listed = [float(part) for part in text.split(",")]
    except ValueError:
        listed = [0.0]
    if not all(0 < fraction <= 1 for fraction in listed):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of fractions; write numbers > 0 and <= 1, as in 0.01,0.1"
        )
    return listed


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def _integers(text: str) -> list[int]:
    """The integers of a comma-separated list; none if anything else is in it."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return []
