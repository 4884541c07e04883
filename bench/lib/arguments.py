"""What the arguments of `python -m bench` look like."""

from __future__ import annotations

import argparse

from bench import peers

AXES = ("N", "D", "V")
BACKWARDS = ("exact", "sparse")
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
    """The shapes to measure: `base`, or in its place `base` with one size replaced by each of its axis's sweeps."""
    shapes = [base] if not sweeps else []
    for axis, sizes in sweeps:
        for size in sizes:
            n, d, v = (size if name == axis else own for name, own in zip(AXES, base, strict=True))
            shapes.append((n, d, v))
    return list(dict.fromkeys(shapes))


def implementations(text: str) -> list[str]:
    known = peers.names()
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown implementation {name!r}; use some of {', '.join(known)}")
    if not chosen:
        raise argparse.ArgumentTypeError(f"names no implementation; use some of {', '.join(known)}")
    return chosen


def backwards(text: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    if not chosen or not set(chosen) <= set(BACKWARDS):
        raise argparse.ArgumentTypeError(f"{text!r} is no choice; use some of {', '.join(BACKWARDS)}")
    return list(dict.fromkeys(chosen))


def sizes(text: str) -> list[int]:
    found = _integers(text)
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes; write whole numbers >= 1, as in 128,256")
    return found


def fractions(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < fraction <= 1 for fraction in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of fractions; write numbers > 0 and <= 1, as in 0.01,0.1"
        )
    return found


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
