"""Which rows are a chunk, and which chunks are multiplied at once: what fits the workspace, in whole tiles of the GEMMs."""

from __future__ import annotations

import math

from fastkl.kernels.gemm import compute_dtype, even_chunks, gradient_dtype, most_rows, row_length
from fastkl.kernels.problem import Inputs, Needs, Spec
from fastkl.kernels.sparse.estimator import block_rows, device_kind

# What the logits of a chunk may take, and its gradient. On a GPU large chunks keep the GEMMs at full speed.
WORKSPACE_BYTES = {"cpu": 128 * 2**20, "accelerator": 2**30}
# With fewer the GEMMs of a CPU read the weight too often; at V = 150k these are 160 MB.
LEAST_ROWS = {"cpu": 256, "accelerator": 1}
# Rows of a tile of the GEMMs' result, the largest first.
TILE_ROWS = {"cpu": (1,), "accelerator": (256, 128, 1)}
# Over this many rows a product that is added to the weight's gradient has far more to multiply than to read and write.
LONG_PRODUCT_ROWS = 5120


def row_chunks(spec: Spec, inputs: Inputs, gradient: bool) -> list[slice]:
    """The rows of each chunk: at most `spec.chunk_size`, or what the workspace budget holds, spread evenly.

    On an accelerator they are whole tiles of the GEMMs where that many fit: a part of one costs as much as all of it.
    For a sparse backward they are whole blocks too, unless `spec.chunk_size` is less than one.
    """
    return even_chunks(inputs.hidden.shape[0], *_limit_and_multiple(spec, inputs, gradient))


def chunk_rows(spec: Spec, inputs: Inputs, gradient: bool) -> int:
    """Rows of the workspace: those of the largest of `row_chunks`, whole tiles of them where there are several."""
    n, (limit, multiple) = inputs.hidden.shape[0], _limit_and_multiple(spec, inputs, gradient)
    return n if n <= limit else -(-most_rows(even_chunks(n, limit, multiple)) // multiple) * multiple


def _limit_and_multiple(spec: Spec, inputs: Inputs, gradient: bool) -> tuple[int, int]:
    """How many rows a chunk may have, and what they are to be a multiple of."""
    kind = device_kind(inputs.hidden.device)
    block = block_rows(inputs.hidden.device) if gradient and spec.sparse is not None else 1
    limit = spec.chunk_size
    if limit is None:
        budget = WORKSPACE_BYTES[kind] // workspace_bytes_per_row(spec, inputs, gradient)
        limit = max(budget, block, LEAST_ROWS[kind])
    multiples = [math.lcm(tile, block if limit >= block else 1) for tile in TILE_ROWS[kind]]
    return limit, next(multiple for multiple in multiples if multiple <= limit)


def products(spec: Spec, inputs: Inputs, needs: Needs) -> list[list[slice]]:
    """The chunks whose gradients are multiplied at once, as one long product.

    Their 16-bit gradients are kept side by side, as far as the workspace budget has room beside the logits. A product that
    is added to the weight's gradient reads and writes all of it: for one there are about `LONG_PRODUCT_ROWS`. Each chunk by
    itself where a gradient takes the place of its logits, a sample is taken, or `spec.chunk_size` says how many rows there
    may be.
    """
    chunks = row_chunks(spec, inputs, gradient=True)
    if len(chunks) < 2 or not gradient_lies_apart(inputs) or spec.sparse is not None or spec.chunk_size is not None:
        return [[rows] for rows in chunks]
    most = chunk_rows(spec, inputs, gradient=True)
    logits = workspace_bytes_per_row(spec, inputs, gradient=False)
    room = WORKSPACE_BYTES[device_kind(inputs.hidden.device)] - most * logits
    together = max(1, room // (most * (workspace_bytes_per_row(spec, inputs, gradient=True) - logits)))
    if needs.weight:
        together = max(together, -(-len(chunks) // -(-inputs.hidden.shape[0] // LONG_PRODUCT_ROWS)))
    return [chunks[group] for group in even_chunks(len(chunks), together)]


def workspace_bytes_per_row(spec: Spec, inputs: Inputs, gradient: bool) -> int:
    """Logits of the student, of the teacher if there is one, and the gradient where it needs a place of its own.

    The gradient alone where it leaves the product as such.
    """
    logits, low = compute_dtype(inputs.hidden.dtype), gradient_dtype(inputs.hidden)
    apart = low.itemsize if gradient and gradient_lies_apart(inputs) else 0
    ids = inputs.weight.shape[0] if spec.share is None else spec.share.most  # as many rows on all processes
    length = row_length(ids, inputs.hidden.device)
    if gradient and spec.backend == "epilogue":
        return length * low.itemsize
    return length * (logits.itemsize * (1 if spec.teacher is None else 2) + apart)


def gradient_lies_apart(inputs: Inputs) -> bool:
    """Whether the gradient of a chunk cannot take the place of its logits."""
    return gradient_dtype(inputs.hidden) != compute_dtype(inputs.hidden.dtype)
