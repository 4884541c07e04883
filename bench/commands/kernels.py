"""What the compiler makes of every Triton kernel, for chips that need not be there.

    python -m bench kernels --json kernels.json                              the variants that the tests compile, all chips
    python -m bench kernels --all --target sm_90 --kernel rows.token_nll     all that the launcher can ask for

Columns of the table, keys of the JSON rows:

    kernel, config, target     the function, the variant that it is compiled for, the chip
    registers                  per thread (vector registers on a gfx chip)
    spill_bytes                local memory per thread: 0, or the variant is a mistake
    shared_bytes               shared memory per program
    load_bytes, store_bytes    the widest access of a thread to global memory, not counting cp.async and descriptors, which
                               is 16 where rows move in vectors; the id of a token has 8
    tensor_core                family of the matrix instructions: wgmma, mma, tcgen05 or mfma; null: none
    code_bytes                 machine code

Nothing is run and nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from bench.lib import arguments as checked
from bench.lib.machine import describe_versions
from fastkl._check.json_file import write_json

HEADINGS = {
    **{"kernel": "kernel", "target": "target", "registers": "reg", "spill_bytes": "spill", "shared_bytes": "shared"},
    **{"load_bytes": "load", "store_bytes": "store", "tensor_core": "tensor", "code_bytes": "code"},
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checked.add_names(parser, "--target", "target", TARGETS, "compile for these")
    parser.add_argument("--kernel", metavar="A,B", help="compile what these launch only, such as rows.token_nll")
    parser.add_argument("--all", action="store_true", help="compile every variant; takes many minutes")
    checked.add_json(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    try:
        from bench.variants import VARIANTS  # imported here: Triton exists on Linux only
    except ImportError as error:
        parser.error(f"compiling kernels needs triton >= 3.6, and it cannot be imported ({error}): install it")
    known = sorted({v.kernel for v in VARIANTS})
    try:
        kernels = known if arguments.kernel is None else checked.names("kernel", known)(arguments.kernel)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --kernel: {error}")
    chosen = [v for v in VARIANTS if (arguments.all or v.representative) and v.kernel in kernels]
    print(f"{_line(list(HEADINGS.values()))}  config")
    rows = []
    for row in _rows(chosen, arguments.target):
        print(f"{_line([row[key] for key in HEADINGS])}  {row['config']}", flush=True)
        rows.append(row)
    write_json(arguments.json, {"rows": rows, "versions": describe_versions()})


def _line(cells: list[Any]) -> str:
    kernel, target, *others = ("-" if cell is None else cell for cell in cells)
    return f"{kernel:23} {target:7}" + "".join(f" {cell:>7}" for cell in others)


def _rows(variants: list[Any], targets: list[str]) -> Iterator[dict[str, Any]]:
    from bench.variants.aot import compiler, resources

    with compiler() as compile_launch:
        for target in targets:
            for variant in variants:
                for name, kernel in compile_launch(target, variant.launch):
                    described = {"kernel": name, "config": variant.config, "target": target}
                    yield described | resources(kernel)._asdict()
