"""What the compiler makes of every Triton kernel, for chips that need not be there.

    python -m bench kernels --json kernels.json                              the variants that the tests compile, all chips
    python -m bench kernels --all --target sm_90 --kernel rows.token_nll     all that the launcher can ask for

Columns of the table, keys of the JSON rows:

    kernel, config, target     the function, the variant that it is compiled for, the chip
    registers                  per thread (vector registers on a gfx chip)
    spill_bytes                local memory per thread: 0, or the variant is a mistake
    shared_bytes               shared memory per program
    tensor_core                family of the matrix instructions: wgmma, mma, tcgen05 or mfma; null: none
    code_bytes                 machine code

Nothing is run and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.lib.machine import describe_versions

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=_targets, default=list(TARGETS), metavar="A,B", help=", ".join(TARGETS))
    parser.add_argument("--kernel", type=_names, metavar="A,B", help="what these launch only, such as rows.token_nll")
    parser.add_argument("--all", action="store_true", help="every variant, not the representative ones; many minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    try:
        from bench.variants import VARIANTS  # imported here: Triton exists on Linux only
    except ImportError as error:
        parser.error(f"compiling kernels needs triton >= 3.6, and it cannot be imported ({error}): install it")
    variants = [v for v in VARIANTS if arguments.all or v.representative]
    known = sorted({v.kernel for v in VARIANTS})
    for name in arguments.kernel or ():
        if name not in known:
            parser.error(f"argument --kernel: unknown kernel {name!r}; use some of {', '.join(known)}")
    chosen = [v for v in variants if arguments.kernel is None or v.kernel in arguments.kernel]
    print(f"{'kernel':23} {'target':7} {'reg':>4} {'spill':>6} {'shared':>7} {'tensor':>7} {'code':>7}  config")
    rows = []
    for row in _rows(chosen, arguments.target):
        print(
            f"{row['kernel']:23} {row['target']:7} {row['registers']:>4} {row['spill_bytes']:>6} {row['shared_bytes']:>7} "
            f"{row['tensor_core'] or '-':>7} {row['code_bytes']:>7}  {row['config']}",
            flush=True,
        )
        rows.append(row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "versions": describe_versions()}, indent=2) + "\n")


def _rows(variants: list[Any], targets: list[str]) -> Iterator[dict[str, Any]]:
    from bench.variants.aot import compiler, resources

    with compiler() as compile_launch:
        for target in targets:
            for variant in variants:
                for name, kernel in compile_launch(target, variant.launch):
                    described = {"kernel": name, "config": variant.config, "target": target}
                    yield described | resources(kernel)._asdict()


def _targets(text: str) -> list[str]:
    names = _names(text)
    for name in names:
        if name not in TARGETS:
            raise argparse.ArgumentTypeError(f"unknown target {name!r}; use some of {', '.join(TARGETS)}")
    return names


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names nothing")
    return names
