"""The arguments that choose a problem's rows: `bench loss` and `bench sparse` share them and their checks."""

from __future__ import annotations

import argparse

from bench.lib import arguments as checked
from bench.lib.arguments import Shape
from bench.lib.cases import DATA
from bench.lib.real_rows import MODELS, real_rows

SHAPE = (1536, 576, 49152)


def add_rows_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        type=checked.shape,
        metavar="N,D,V",
        help=f"set tokens, hidden size and vocabulary; {','.join(map(str, SHAPE))} by default, or what --data has",
    )
    parser.add_argument(
        "--data",
        choices=DATA,
        default="peaked",
        help="choose rows like a trained model's, the same without shared tails, a new model's, or a real model's own",
    )
    parser.add_argument("--temperature", type=float, help="take rows that a real model sampled at this; 1 by default")


def shapes_and_temperature(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, sweeps: list[tuple[str, list[int]]]
) -> tuple[list[Shape], float]:
    """The shapes to measure and the temperature of the rows. Real rows have their model's D and V, and an end."""
    temperature = _temperature(arguments, parser)
    try:
        largest = _default_shape(arguments.data, temperature)
    except FileNotFoundError as error:
        parser.error(f"argument --data {arguments.data}: {error}")
    shapes = checked.swept(arguments.shape or largest, sweeps)
    for shape in shapes if arguments.data in MODELS else ():
        if shape[0] > largest[0] or shape[1:] != largest[1:]:
            parser.error(f"argument --shape: {shape} with --data {arguments.data}, which has {largest} and fewer rows")
    return shapes, temperature


def _default_shape(data: str, temperature: float) -> Shape:
    if data not in MODELS:
        return SHAPE
    rows = real_rows(data, temperature)
    vocabulary, d = rows.weight.shape
    return min(rows.hidden.shape[0], MODELS[data].rows), d, vocabulary


def _temperature(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> float:
    if arguments.temperature is None:
        return 1.0
    if arguments.data not in MODELS:
        parser.error(
            f"argument --temperature: {arguments.data} rows have none; it belongs to --data {', '.join(MODELS)}"
        )
    if not arguments.temperature > 0:
        parser.error(f"argument --temperature: {arguments.temperature}; it must be > 0")
    return float(arguments.temperature)
