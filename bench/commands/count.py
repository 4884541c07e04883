"""GEMMs, bytes and workspace of each plan, counted: what there is to do, whatever a machine makes of it.

    python -m bench count                                    the shapes of four models, bf16
    python -m bench count --kept 0.01,0.05,0.2               and the sparse backward, by the fraction of u that is kept
    python -m bench count --epilogue                         and the plan of the policy gradient without logits in memory
    python -m bench count --bias                             and heads with a bias
    python -m bench count --shape 4096,1024,65536 --json count.json

Columns of the table, keys of the JSON rows:

    form                values: no gradient, by way of logits (16-bit heads on a GPU are scored without any);
                        frozen: gradient of hidden; trainable: of the weight too; composed: the same for any upstream
                        gradient, which forms the logits twice. "+ teacher": with a second head. "epilogue": a product in
                        Triton whose epilogue is the row pass; the units are as if it were as fast as the vendor's
    kept                fraction of the columns that the sparse backward in Triton keeps of each block; null: exact
    gemm_units          floating-point operations, in units of 2·N·D·V
    tile_units          the same with whole tiles of TILE × TILE results: what is done for a part of one too
    passes              how often the row kernels, and those that draw columns, read or write N·V elements (float32 read,
                        gradient in the inputs' dtype); compaction counts as one whole read, because it reads in scattered
                        places
    row_gb, gemm_gb     bytes that the row kernels and the GEMMs move at least (1e9), chunk by chunk
    other_gb            bytes of passes by PyTorch over N·V or V·D elements: the weight's gradient times the upstream one,
                        in the weight's dtype; the gradient of a bias. Temperature and scale are in the GEMM, and
                        row kernels add a bias while they read
    accumulator_passes  how often the weight's gradient is read or written while it is summed
    chunk_rows          rows per chunk
    product_rows        rows of the longest product that makes a gradient; 0 without one, or with a sample
    workspace_mb        logits of a chunk and gradients of a product (1e6 bytes), without the columns that "composed" keeps
    units_low, _high    the time in units at the two rates in RATES, if every GEMM hides its traffic and if none does.
                        An estimate to compare a measurement with. Products of drawn columns gather rows in Triton and
                        hardly reach the vendor's rate

Left out: launches, products and passes over [N, D], what a GEMM reads twice, a bias that stays in a cache, and PyTorch's
operations over [V] for each block of the sparse backward. All rows take part.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.lib import arguments as checked
from bench.lib.arguments import Shape
from fastkl._check.json_file import write_json
from fastkl.kernels import chunking
from fastkl.kernels.gemm import compute_dtype, gradient_dtype, row_length
from fastkl.kernels.operators.flops import gemm_flops
from fastkl.kernels.options import Sparse
from fastkl.kernels.problem import Backend, HeadOptions, Inputs, Needs, Spec
from fastkl.kernels.sparse.estimator import SPLIT, blocks, device_kind

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
TILE = {
    "cpu": 1,
    "accelerator": 128,
}  # rows and columns of the smallest tile of a result that is multiplied at full speed


class Work(NamedTuple):
    """One product, or what a row kernel does, over all chunks."""

    flops: int
    bytes: int
    tile_flops: int = 0  # with whole tiles


class Count(NamedTuple):
    """What one evaluation of a form does."""

    gemms: list[Work]
    rows: Work
    passes: float
    chunk_rows: int
    workspace: int  # bytes
    others: int = 0  # bytes of PyTorch's passes over N·V or V·D elements
    accumulator_passes: int = 0
    product_rows: int = 0

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.gemms)

    @property
    def tile_flops(self) -> int:
        return sum(work.tile_flops for work in self.gemms)

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
    bias: bool = False,
    backend: Backend = "auto",
) -> Count:
    """The work of a form; the teacher's hidden size is the student's. Nothing is allocated, no device is needed.

    `backend` "epilogue": gradients without logits (`kernels/epilogue/triton.py`), of what has no teacher and no sample.
    `kept`: the sparse backward in Triton keeps this fraction of each block's columns; None: the exact backward.
    """
    n, d, vocabulary = shape
    spec = Spec("token_nll", HeadOptions(), None, backend, chunk_size)
    if teacher:
        spec = Spec("divergence", HeadOptions(), HeadOptions(), "auto", chunk_size, "reverse_kl")
    if kept is not None:
        spec = spec._replace(sparse=Sparse(0))  # with whatever error keeps this many
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, d, dtype=dtype, device=device) for rows in (n, vocabulary))
        head_bias = torch.empty(vocabulary, dtype=dtype, device=device) if bias else None
        inputs = Inputs(hidden, weight, head_bias, None, *((hidden, weight, head_bias) if teacher else ()))
        if form == "composed" and kept is not None:
            counts = _sparse_composed(spec, inputs, kept)
        else:
            counts = [_call(spec, inputs, _with_bias(needs, bias), kept) for needs in FORMS[form]]
        finish = _finish(inputs, upstream=form != "composed") if form in ("trainable", "composed") else 0
    return Count(
        [gemm for part in counts for gemm in part.gemms],
        Work(0, sum(part.rows.bytes for part in counts)),
        sum(part.passes for part in counts),
        min(part.chunk_rows for part in counts),
        max(part.workspace for part in counts),
        finish + sum(part.others for part in counts),
        sum(part.accumulator_passes for part in counts),
        max(part.product_rows for part in counts),
    )


def _with_bias(needs: Needs | None, bias: bool) -> Needs | None:
    """A trained head's bias is trained too."""
    return needs and needs._replace(bias=bias and needs.weight)


def _call(spec: Spec, inputs: Inputs, needs: Needs | None, kept: float | None = None) -> Count:
    """One call of the driver."""
    (n, d), vocabulary = inputs.hidden.shape, inputs.weight.shape[0]
    heads = 1 if spec.teacher is None else 2
    operand, full, low = _item_sizes(inputs.hidden)
    once, hidden, weight = n * vocabulary, n * d, vocabulary * d
    flops = gemm_flops(n, vocabulary, d)
    chunks = chunking.row_chunks(spec, inputs, needs is not None)
    step = chunking.chunk_rows(spec, inputs, needs is not None)
    workspace = step * chunking.workspace_bytes_per_row(spec, inputs, needs is not None)
    tiles = 2 * _whole(inputs, *_rows_of(chunks)) * _whole(inputs, vocabulary) * d
    gemms = [Work(flops, hidden * operand + len(chunks) * weight * operand + once * full, tiles)] * heads
    if needs is None:
        return Count(gemms, Work(0, heads * once * full), heads, step, workspace)
    # A row kernel reads the logits for the values and for the gradient, and writes the gradient.
    reads = heads * _walks(spec, inputs)
    rows, passes = Work(0, reads * once * full + once * low), reads + 1
    if spec.backend == "epilogue":  # the product writes the gradient; a row of W goes to each token
        gemms = [Work(flops, gemms[0].bytes - once * (full - low) + 2 * hidden * operand, gemms[0].tile_flops)]
        rows, passes = Work(0, 0), 0
    others = once * low if needs.bias else 0
    forward = Count(gemms, rows, passes, step, workspace, others)
    if kept is not None:
        return _sparse_call(forward, spec, inputs, needs, kept)
    spans = [slice(group[0].start, group[-1].stop) for group in chunking.products(spec, inputs, needs)]
    longest = max(_rows_of(spans))
    if low != full:
        workspace += max(0, longest - step) * row_length(vocabulary, inputs.hidden.device) * low
    forward = forward._replace(workspace=workspace, product_rows=longest)
    if needs.hidden:
        tiles = 2 * _whole(inputs, *_rows_of(spans)) * _whole(inputs, d) * vocabulary
        gemms.append(Work(flops, once * low + len(spans) * weight * operand + hidden * full, tiles))
    if not needs.weight:
        return forward
    passes = 2 * len(spans) - 1  # the first product is written, others are added
    tiles = 2 * _whole(inputs, vocabulary) * _whole(inputs, d) * n
    gemms.append(Work(flops, once * low + hidden * operand + passes * weight * full, tiles))
    return forward._replace(accumulator_passes=passes)


def _walks(spec: Spec, inputs: Inputs) -> int:
    """How often a row kernel reads the logits: `rows/triton.py` says where the values and a gradient take one walk."""
    return 1 if spec.kind == "token_nll" and gradient_dtype(inputs.hidden) == torch.bfloat16 else 2


def _finish(inputs: Inputs, upstream: bool) -> int:
    """Bytes of the pass that makes the weight's gradient what its owner gets: by the upstream gradient, in its dtype."""
    operand, full, _ = _item_sizes(inputs.hidden)
    if operand != full:
        return inputs.weight.numel() * (full + operand)
    return inputs.weight.numel() * 2 * full if upstream else 0


def _rows_of(parts: list[slice]) -> list[int]:
    return [rows.stop - rows.start for rows in parts]


def _whole(inputs: Inputs, *sizes: int) -> int:
    """The sum of sizes of products, in whole tiles each."""
    tile = TILE[device_kind(inputs.hidden.device)]
    return sum(-(-size // tile) * tile for size in sizes)


def _sparse_call(forward: Count, spec: Spec, inputs: Inputs, needs: Needs, kept: float) -> Count:
    """A call whose gradients come from drawn columns of each block, as `kernels/sparse/triton.py` makes them."""
    (n, d), vocabulary = inputs.hidden.shape, inputs.weight.shape[0]
    operand, full, low = _item_sizes(inputs.hidden)
    sizes = _blocks(spec, inputs)
    once, columns = n * vocabulary, len(sizes) * vocabulary
    entries, kept_rows = kept * once * low, kept * columns * d
    splits = sum(-(-size // SPLIT) for size in sizes)
    squares = once * low + (2 * splits * vocabulary + columns) * full
    selection = (2 * columns + 2 * kept * columns) * full  # ids and 1 / π have 4 bytes each
    compaction = once * low + entries
    gemms, flops = list(forward.gemms), round(kept * gemm_flops(n, vocabulary, d))
    if needs.hidden:
        gemms.append(Work(flops, round(entries + kept_rows * operand + n * d * operand), flops))
    if needs.weight:  # an accumulator of zeros; its kept rows are read and written
        gemms.append(Work(flops, round(entries + n * d * low + 2 * kept_rows * full) + vocabulary * d * full, flops))
    rows = Work(0, forward.rows.bytes + round(squares + selection + compaction))
    return forward._replace(gemms=gemms, rows=rows, passes=forward.passes + 2 + kept)


def _sparse_composed(spec: Spec, inputs: Inputs, kept: float) -> list[Count]:
    """The forward pass; the weight's gradient from the blocks that it had room to keep; the other rows again."""
    (n, d), vocabulary = inputs.hidden.shape, inputs.weight.shape[0]
    operand, full, low = _item_sizes(inputs.hidden)
    first = _call(spec, inputs, Needs(True, False, False), kept)
    room, with_room = float(vocabulary * d), []
    for size in _blocks(spec, inputs):
        if size * kept * vocabulary <= room:
            room -= size * kept * vocabulary
            with_room.append(size)
    rows = sum(with_room)
    entries = kept * rows * vocabulary * low
    # The product is written by itself; it and the accumulator's rows are read, and those are written.
    moved = entries + rows * d * operand + 4 * kept * len(with_room) * vocabulary * d * full
    zeros = vocabulary * d * full if rows == n else 0
    flops = round(kept * gemm_flops(rows, vocabulary, d))
    product = Work(flops, round(moved) + zeros, flops)
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


def _blocks(spec: Spec, inputs: Inputs) -> list[int]:
    """The rows of each block of a call."""
    chunks = _rows_of(chunking.row_chunks(spec, inputs, gradient=True))
    return [block for rows in chunks for block in _rows_of(list(blocks(rows, inputs.hidden.device)))]


def units(work: Count, shape: Shape) -> tuple[float, float]:
    """Estimated time over that of one GEMM: the least, and without any overlap."""
    n, d, vocabulary = shape
    unit = 2 * n * d * vocabulary / RATES["flops"]
    rows = (work.rows.bytes + work.others) / RATES["bytes"]
    pairs = [(gemm.tile_flops / RATES["flops"], gemm.bytes / RATES["bytes"]) for gemm in work.gemms]
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
    parser.add_argument(
        "--epilogue", action="store_true", help="count the policy gradient without logits in memory too"
    )
    parser.add_argument("--bias", action="store_true", help="count heads with a bias too, trained where the weight is")
    checked.add_json(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    shapes = SHAPES if arguments.shape is None else {",".join(map(str, arguments.shape)): arguments.shape}
    rows: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        of_model = _rows(name, shape, arguments)
        _print(of_model)
        rows += of_model
    write_json(arguments.json, {"rows": rows, "rates": RATES, "counted": True})


def _print(rows: list[dict[str, Any]]) -> None:
    """The table of one model."""
    print(f"{rows[0]['model']}, N,D,V = {','.join(map(str, rows[0]['shape']))}, bf16: counted, not measured")
    print(
        f"{'form':32}{'GEMMs':>6}{'tiles':>6}{'passes':>8}{'rows GB':>9}{'GEMM GB':>9}{'other GB':>9}{'dW':>4}"
        f"{'chunk':>7}{'product':>8}{'MB':>6}   units at RATES"
    )
    for row in rows:
        print(
            f"{row['form']:32}{row['gemm_units']:>6.2f}{row['tile_units']:>6.2f}{row['passes']:>8.4g}{row['row_gb']:>9.1f}"
            f"{row['gemm_gb']:>9.1f}{row['other_gb']:>9.1f}{row['accumulator_passes']:>4}{row['chunk_rows']:>7}"
            f"{row['product_rows']:>8}{row['workspace_mb']:>6.0f}   {row['units_low']:.2f} … {row['units_high']:.2f}"
        )


def _rows(model: str, shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    teachers, biases = (False, True), (False, True) if arguments.bias else (False,)
    plans: list[tuple[Any, ...]] = [(form, teacher, None) for teacher in teachers for form in FORMS]
    plans += [
        (form, teacher, kept) for teacher in teachers for kept in arguments.kept for form in FORMS if form != "values"
    ]
    plans += [(form, False, None, "epilogue") for form in ("frozen", "trainable") if arguments.epilogue]
    return [_row(model, shape, arguments.chunk_size, bias, *plan) for bias in biases for plan in plans]


def _row(
    model: str,
    shape: Shape,
    chunk_size: int | None,
    bias: bool,
    form: str,
    teacher: bool,
    kept: float | None,
    backend: Backend = "auto",
) -> dict[str, Any]:
    work = count(form, shape, teacher=teacher, chunk_size=chunk_size, kept=kept, bias=bias, backend=backend)
    unit = gemm_flops(shape[0], shape[2], shape[1])
    low, high = units(work, shape)
    plan = ("" if kept is None else f", {100 * kept:g} % kept") + f", {backend}" * (backend != "auto")
    return {
        "model": model,
        "shape": list(shape),
        "form": form + " + teacher" * teacher + ", bias" * bias + plan,
        "kept": kept,
        "bias": bias,
        "gemm_units": work.flops / unit,
        "tile_units": work.tile_flops / unit,
        "passes": work.passes,
        "row_gb": work.rows.bytes / 1e9,
        "gemm_gb": work.gemm_bytes / 1e9,
        "other_gb": work.others / 1e9,
        "accumulator_passes": work.accumulator_passes,
        "chunk_rows": work.chunk_rows,
        "product_rows": work.product_rows,
        "workspace_mb": work.workspace / 1e6,
        "units_low": low,
        "units_high": high,
    }
