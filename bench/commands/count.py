"""GEMMs, bytes and workspace of each plan, counted: what there is to do, whatever a machine makes of it.

    python -m bench count                                    the shapes of four models, bf16
    python -m bench count --kept 0.01,0.05,0.2               and the sparse backward, by the fraction of u that is kept
    python -m bench count --shape 4096,1024,65536 --json count.json

Columns of the table, keys of the JSON rows:

    form                values: no gradient, by way of logits (16-bit heads on a GPU are scored without any);
                        frozen: gradient of hidden; trainable: of the weight too; composed: the same for any upstream
                        gradient, which forms the logits twice. "+ teacher": with a second head
    kept                fraction of the columns that the sparse backward in Triton keeps of each block; null: exact
    gemm_units          floating-point operations, in units of 2·N·D·V
    passes              how often the row kernels, and those that draw columns, read or write N·V elements (float32 read,
                        gradient in the inputs' dtype); compaction counts as one whole read, because it reads in scattered
                        places
    row_gb, gemm_gb     bytes that the row kernels and the GEMMs move at least (1e9), chunk by chunk
    chunk_rows          rows per chunk
    workspace_mb        logits and gradient of a chunk (1e6 bytes), without the columns that "composed" keeps
    units_low, _high    the time in units at the two rates in RATES, if every GEMM hides its traffic and if none does.
                        An estimate to compare a measurement with. Products of drawn columns gather rows in Triton and
                        hardly reach the vendor's rate

Left out: launches, products over [N, D], what a GEMM reads twice, and PyTorch's operations over [V] for each block of the
sparse backward. All rows take part.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.lib import arguments as checked
from bench.lib.arguments import Shape
from bench.lib.report import write_report
from fastkl.kernels import driver
from fastkl.kernels.flops import gemm_flops
from fastkl.kernels.gemm import compute_dtype, gradient_dtype
from fastkl.kernels.options import Sparse
from fastkl.kernels.problem import HeadOptions, Inputs, Needs, Spec
from fastkl.kernels.sparse.estimator import SPLIT, blocks

SHAPES: dict[str, Shape] = {
    "Qwen3-8B": (8192, 4096, 151936),
    "Qwen3-1.7B": (8192, 2048, 151936),
    "Gemma-2-2B": (8192, 2304, 256000),
    "Llama-3-8B": (8192, 4096, 128256),
}
# The calls of the driver that a form makes: the gradients wanted, or None for values alone.
FORMS: dict[str, tuple[Needs | None, ...]] = {
    "values": (None,),
    "frozen": (Needs(True, False, False),),
    "trainable": (Needs(True, True, False),),
    "composed": (None, Needs(True, True, False)),
}
# Of one H200 through PyTorch: a bf16 product of 8192³ random numbers, and a copy (bytes read and written).
RATES = {"flops": 790e12, "bytes": 4.3e12}


class Work(NamedTuple):
    """One product, or what a row kernel does, over all chunks."""

    flops: int
    bytes: int


class Count(NamedTuple):
    """What one evaluation of a form does."""

    gemms: list[Work]
    rows: Work
    passes: float
    chunk_rows: int
    workspace: int  # bytes

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.gemms)

    @property
    def gemm_bytes(self) -> int:
        return sum(work.bytes for work in self.gemms)


def count(
    form: str,
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    teacher: bool = False,
    chunk_size: int | None = None,
    device: str = "cuda",
    kept: float | None = None,
) -> Count:
    """The work of a form; the teacher's hidden size is the student's. Nothing is allocated, no device is needed.

    `kept`: the sparse backward in Triton keeps this fraction of each block's columns; None: the exact backward.
    """
    n, d, vocabulary = shape
    spec = Spec("token_nll", HeadOptions(), None, "auto", chunk_size)
    if teacher:
        spec = Spec("divergence", HeadOptions(), HeadOptions(), "auto", chunk_size, "reverse_kl")
    if kept is not None:
        spec = spec._replace(sparse=Sparse(0))  # with whatever error keeps this many
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, d, dtype=dtype, device=device) for rows in (n, vocabulary))
        inputs = Inputs(hidden, weight, None, None, *((hidden, weight) if teacher else ()))
        if form == "composed" and kept is not None:
            counts = _sparse_composed(spec, inputs, kept)
        else:
            counts = [_call(spec, inputs, needs, kept) for needs in FORMS[form]]
    return Count(
        [gemm for part in counts for gemm in part.gemms],
        Work(0, sum(part.rows.bytes for part in counts)),
        sum(part.passes for part in counts),
        min(part.chunk_rows for part in counts),
        max(part.workspace for part in counts),
    )


def _call(spec: Spec, inputs: Inputs, needs: Needs | None, kept: float | None = None) -> Count:
    """One call of the driver."""
    (n, d), vocabulary = inputs.hidden.shape, inputs.weight.shape[0]
    heads = 1 if spec.teacher is None else 2
    step = driver.chunk_rows(spec, inputs, needs is not None)
    workspace = step * driver.workspace_bytes_per_row(spec, inputs, needs is not None)
    chunks = -(-n // step)
    operand, full, low = _item_sizes(inputs.hidden)
    once, hidden, weight = n * vocabulary, n * d, vocabulary * d
    flops = gemm_flops(n, vocabulary, d)
    gemms = [Work(flops, hidden * operand + chunks * weight * operand + once * full)] * heads
    if needs is None:
        return Count(gemms, Work(0, heads * once * full), heads, step, workspace)
    # A row kernel reads the logits twice, for the values and for the gradient, and writes the gradient.
    forward = Count(gemms, Work(0, 2 * heads * once * full + once * low), 2 * heads + 1, step, workspace)
    if kept is not None:
        return _sparse_call(forward, inputs, needs, kept)
    if needs.hidden:
        gemms.append(Work(flops, once * low + chunks * weight * operand + hidden * full))
    if needs.weight:  # the first chunk writes the accumulator, the others read and write it
        gemms.append(Work(flops, once * low + hidden * operand + (2 * chunks - 1) * weight * full))
    return forward


def _sparse_call(forward: Count, inputs: Inputs, needs: Needs, kept: float) -> Count:
    """A call whose gradients come from drawn columns of each block, as `kernels/sparse/triton.py` makes them."""
    (n, d), vocabulary = inputs.hidden.shape, inputs.weight.shape[0]
    operand, full, low = _item_sizes(inputs.hidden)
    sizes = _blocks(n, forward.chunk_rows, inputs.hidden.device)
    once, columns = n * vocabulary, len(sizes) * vocabulary
    entries, kept_rows = kept * once * low, kept * columns * d
    splits = sum(-(-size // SPLIT) for size in sizes)
    squares = once * low + (2 * splits * vocabulary + columns) * full
    selection = (2 * columns + 2 * kept * columns) * full  # ids and 1 / π have 4 bytes each
    compaction = once * low + entries
    gemms, flops = list(forward.gemms), round(kept * gemm_flops(n, vocabulary, d))
    if needs.hidden:
        gemms.append(Work(flops, round(entries + kept_rows * operand + n * d * operand)))
    if needs.weight:  # an accumulator of zeros; its kept rows are read and written
        gemms.append(Work(flops, round(entries + n * d * low + 2 * kept_rows * full) + vocabulary * d * full))
    rows = Work(0, forward.rows.bytes + round(squares + selection + compaction))
    return forward._replace(gemms=gemms, rows=rows, passes=forward.passes + 2 + kept)


def _sparse_composed(spec: Spec, inputs: Inputs, kept: float) -> list[Count]:
    """The forward pass; the weight's gradient from the blocks that it had room to keep; the other rows again."""
    (n, d), vocabulary = inputs.hidden.shape, inputs.weight.shape[0]
    operand, full, low = _item_sizes(inputs.hidden)
    first = _call(spec, inputs, Needs(True, False, False), kept)
    room, with_room = float(vocabulary * d), []
    for size in _blocks(n, first.chunk_rows, inputs.hidden.device):
        if size * kept * vocabulary <= room:
            room -= size * kept * vocabulary
            with_room.append(size)
    rows = sum(with_room)
    entries = kept * rows * vocabulary * low
    # The product is written by itself; it and the accumulator's rows are read, and those are written.
    moved = entries + rows * d * operand + 4 * kept * len(with_room) * vocabulary * d * full
    zeros = vocabulary * d * full if rows == n else 0
    product = Work(round(kept * gemm_flops(rows, vocabulary, d)), round(moved) + zeros)
    parts = [first, Count([product], Work(0, round(2 * entries)), 2 * kept * rows / n, first.chunk_rows, 0)]
    if rows < n:
        hidden = torch.empty(n - rows, d, dtype=inputs.hidden.dtype, device=inputs.hidden.device)
        rest = inputs._replace(hidden=hidden, teacher_hidden=None if inputs.teacher_hidden is None else hidden)
        again = _call(spec, rest, Needs(False, True, False), kept)
        parts.append(again._replace(chunk_rows=first.chunk_rows, passes=again.passes * (n - rows) / n))
    return parts


def _item_sizes(hidden: torch.Tensor) -> tuple[int, int, int]:
    """Bytes of a number of the operands, of logits and accumulators, and of u."""
    return hidden.itemsize, compute_dtype(hidden.dtype).itemsize, gradient_dtype(hidden).itemsize


def _blocks(n: int, chunk_rows: int, device: torch.device) -> list[int]:
    """The rows of each block of a call."""
    chunks = [min(chunk_rows, n - start) for start in range(0, n, chunk_rows)]
    return [block.stop - block.start for rows in chunks for block in blocks(rows, device)]


def units(work: Count, shape: Shape) -> tuple[float, float]:
    """Estimated time over that of one GEMM: the least, and without any overlap."""
    n, d, vocabulary = shape
    unit = 2 * n * d * vocabulary / RATES["flops"]
    rows = work.rows.bytes / RATES["bytes"]
    pairs = [(gemm.flops / RATES["flops"], gemm.bytes / RATES["bytes"]) for gemm in work.gemms]
    return (rows + sum(map(max, pairs))) / unit, (rows + sum(map(sum, pairs))) / unit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", type=checked.shape, metavar="N,D,V", help="count one shape instead of the four models'"
    )
    parser.add_argument("--chunk-size", type=checked.positive, metavar="ROWS", help="set the rows per chunk")
    parser.add_argument(
        "--kept",
        type=checked.fractions,
        default=[],
        metavar="FRACTIONS",
        help="count the sparse backward too, with these fractions of the columns kept",
    )
    checked.add_json(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    shapes = SHAPES if arguments.shape is None else {",".join(map(str, arguments.shape)): arguments.shape}
    rows: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        of_model = _rows(name, shape, arguments.chunk_size, arguments.kept)
        _print(of_model)
        rows += of_model
    write_report(arguments.json, {"rows": rows, "rates": RATES, "counted": True})


def _print(rows: list[dict[str, Any]]) -> None:
    """The table of one model."""
    print(f"{rows[0]['model']}, N,D,V = {','.join(map(str, rows[0]['shape']))}, bf16: counted, not measured")
    print(f"{'form':32}{'GEMMs':>6}{'passes':>8}{'rows GB':>9}{'GEMM GB':>9}{'chunk':>7}{'MB':>6}   units at RATES")
    for row in rows:
        print(
            f"{row['form']:32}{row['gemm_units']:>6.2f}{row['passes']:>8.4g}{row['row_gb']:>9.1f}{row['gemm_gb']:>9.1f}"
            f"{row['chunk_rows']:>7}{row['workspace_mb']:>6.0f}   {row['units_low']:.2f} … {row['units_high']:.2f}"
        )


def _rows(model: str, shape: Shape, chunk_size: int | None, fractions: list[float]) -> list[dict[str, Any]]:
    teachers = False, True
    plans: list[tuple[str, bool, float | None]] = [(form, teacher, None) for teacher in teachers for form in FORMS]
    plans += [(form, teacher, kept) for teacher in teachers for kept in fractions for form in FORMS if form != "values"]
    return [_row(model, shape, chunk_size, *plan) for plan in plans]


def _row(
    model: str, shape: Shape, chunk_size: int | None, form: str, teacher: bool, kept: float | None
) -> dict[str, Any]:
    work = count(form, shape, teacher=teacher, chunk_size=chunk_size, kept=kept)
    low, high = units(work, shape)
    return {
        "model": model,
        "shape": list(shape),
        "form": form + " + teacher" * teacher + ("" if kept is None else f", {100 * kept:g} % kept"),
        "kept": kept,
        "gemm_units": work.flops / gemm_flops(shape[0], shape[2], shape[1]),
        "passes": work.passes,
        "row_gb": work.rows.bytes / 1e9,
        "gemm_gb": work.gemm_bytes / 1e9,
        "chunk_rows": work.chunk_rows,
        "workspace_mb": work.workspace / 1e6,
        "units_low": low,
        "units_high": high,
    }
