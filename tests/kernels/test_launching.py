"""How kernels are launched: on which device, and what Triton's own launcher hands to a CUDA driver.

The driver is a stub (tests/support/cuda/stub_cuda.py): every kernel is compiled and really launched in front of it, by the
launchers of this project, with tensors that say they are on a GPU.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
import triton
from all_kernels import kernels
from fake_cuda import PROCESSORS, Machine
from stub_cuda import SMALL_SHARED_MEMORY, Launch, StubCuda, TensorMap, compiler, load_stub, use_driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.variants import variant
from bench.variants.aot import kernel_name
from bench.variants.fake_cuda import fake_tensors
from bench.variants.launcher import BF16, CUT, FP16, FP32, Variant
from fastkl.kernels import launch
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.launch import launch_rows
from fastkl.kernels.score import triton as score
from fastkl.kernels.sparse import steps
from fastkl.kernels.sparse.estimator import SPLIT

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)
ARCHS = (90, 80)
STREAM = 0x5714


class TwoGenerations(Machine):
    """sm_90, which is current, and sm_80. It serves as a kernel, too, that notes where it runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__(patch, *ARCHS)
        self.launches: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **_: self.launches.append(self.current)


def test_plans_are_for_the_chip_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two generations in one process, whichever is current; which afterwards is current again."""
    machine = TwoGenerations(monkeypatch)
    with fake_tensors():
        for device, access, columns, step in ((HERE, "descriptors", 256, 64), (THERE, "vectors", 128, 32)):
            hidden, weight = (torch.empty(rows, 512, dtype=torch.bfloat16, device=device) for rows in (16, 512))
            plan = score.plan([score.Head(hidden, weight, None, HeadOptions())])
            assert (plan[0], plan[1].block_n) == (access, columns)
            assert steps._product_config(weight, hidden).block_k == step
            launch_rows(machine, Logits(hidden), programs=2)
    assert (machine.launches, machine.current) == ([0, 1], 0)
    assert launch.target_of(THERE).arch == 80


class Seen(NamedTuple):
    """One launch: what Triton was given, what it compiled, and what the driver was told."""

    name: str  # folder.function
    arguments: dict[str, Any]
    kernel: Any  # triton's CompiledKernel
    launch: Launch
    maps: list[TensorMap]
    parameters: list[bytes]  # what the kernel must be given, in the order of its own parameters


@pytest.fixture(scope="session")
def all_seen(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """The launches of every variant, which have come as far as the driver."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, with a driver of its own")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip(f"triton {triton.__version__} is older than the launcher that the stub was written for, 3.7")
    if compiler() is None:
        pytest.skip("no C compiler, or no Python.h, with which Triton builds its launcher")
    folder = tmp_path_factory.mktemp("stub")
    library, stub, seen, launched = load_stub(folder), StubCuda(ARCHS), [], set()
    library.listen(stub.listener)
    original = JITFunction.run
    with pytest.MonkeyPatch.context() as patch, fake_tensors():
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(compiled))
        machine = Machine(patch, *ARCHS)
        use_driver(patch, ARCHS, lambda: machine.current, STREAM)

        def spied(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            stub.context, known = 1 + machine.current, len(stub.maps)
            kernel = original(self, *args, grid=grid, warmup=warmup, **options)
            assert not stub.errors
            maps = stub.maps[known:]
            expected = list(parameters(kernel, options, maps))
            seen.append(Seen(kernel_name(self), options, kernel, stub.launches[-1], maps, expected))
            launched.add(self)

        patch.setattr(JITFunction, "run", spied)
        for one, device in launched_variants():
            with torch.device(device):
                one.launch(n=3, offset=1)
    library.listen(None)
    for function in launched:
        function.device_caches.clear()
    triton.compiler.compiler.max_shared_mem.cache_clear()
    return seen


IN_PLACE, APART, NONE = {"dtypes": (FP32, FP32)}, {"dtypes": (FP32, BF16)}, {"dtypes": (FP32, None)}
WIDE, ODD = {"vocabulary": 151936, "capped": False}, {"vocabulary": 50257, "capped": True}
BOTH_CAPPED = ODD | {"capped_teacher": True, "tokens": True}
ODD_PRODUCT = {"dtype": FP16, "vocabulary": 50257, "dim": 513}
# Few, and such as test_ahead_of_time.py compiles too, in the same folder. test_every_kernel_is_launched says what is
# missing.
LAUNCHED: dict[str, list[dict[str, Any]]] = {
    "rows.token_nll": [
        IN_PLACE | WIDE,
        APART | ODD,
        APART | {"vocabulary": CUT, "capped": False},
        APART | {"vocabulary": CUT, "capped": False, "bias": True},
        {"dtypes": (BF16, None), "vocabulary": 50257},
    ],
    "rows.token_nll_entropy": [NONE | WIDE, NONE | ODD | {"bias": True}],
    "rows.entropy_gradient": [IN_PLACE | WIDE, APART | ODD | {"bias": True}],
    "cross_entropy.cross_entropy": [
        IN_PLACE | WIDE,
        APART | ODD | {"label_smoothing": 0.1, "class_weight": True, "ids": True, "bias": True},
        NONE | {"vocabulary": 50257},
    ],
    "rows.clear_rows": [{**IN_PLACE, "vocabulary": 32000}, {**APART, "vocabulary": 50257}],
    "top_k.tail_sums": [NONE | WIDE, NONE | ODD, NONE | ODD | {"hard": True, "bias": True}],
    "top_k.tail_gradient": [IN_PLACE | WIDE, APART | ODD, APART | ODD | {"hard": True, "bias": True}],
    "divergence.divergence": [
        IN_PLACE | WIDE | {"kind": "forward_kl"},
        APART | BOTH_CAPPED | {"kind": "skewed_forward_kl"},
        NONE | {"kind": "jsd", "capped": True, "extras": True, "vocabulary": 32000},
        APART | BOTH_CAPPED | {"kind": "jsd", "extras": True, "hard": True, "bias": True, "teacher_bias": True},
        APART | ODD | {"kind": "density_power", "extras": True},
    ],
    "score.token_nll": [{}, {"operands": (BF16, 513)}],
    "score.reverse_kl": [{}, {"operands": (BF16, 513)}],
    "epilogue.reference": [{}, {"operands": (BF16, 513), "vocabulary": 4097}],
    "sparse.count_columns": [{}],
    "sparse.column_squares": [{}, {"vocabulary": 50257}],
    "sparse.compact": [{}, {"vocabulary": 50257}],
    "sparse.hidden_gradient": [{}, ODD_PRODUCT],
    "sparse.weight_gradient": [{}, ODD_PRODUCT],
}


def launched_variants() -> list[tuple[Variant, torch.device]]:
    """On sm_90, and what scores on sm_80 too, which has no tensor descriptors."""
    here = [(variant(name, **options), HERE) for name, each in LAUNCHED.items() for options in each]
    return here + [(variant(name), THERE) for name in ("score.token_nll", "score.reverse_kl", "epilogue.reference")]


def test_every_kernel_is_launched(all_seen: list[Seen]) -> None:
    """Each one in the code, in each way that it reads and writes."""
    found: dict[str, set[str]] = {}
    for seen in all_seen:
        found.setdefault(seen.name, set()).update((access(seen), place(seen)))
    in_code = {kernel_name(function): function for function in kernels()}
    assert found.keys() == in_code.keys()
    for name, function in in_code.items():
        missing = ways(name, function) - found[name]
        assert not missing, f"{name} was launched without {missing}"


def ways(name: str, function: Any) -> set[str]:
    """How a kernel may be asked to read and write, by its parameters."""
    found: set[str] = set()
    if "TMA" in function.arg_names:
        found |= set(get_args(score.Access))
    elif any(argument.endswith("_stride_row") for argument in function.arg_names if argument[0] in "xuhw"):
        found |= {"vectors", "scalars"}
    if {"x_ptr", "u_ptr"} <= set(function.arg_names):
        found |= {"in place", "apart"}
    if "u_ptr is not None" in function.src:
        found.add("none")
    return found


def access(seen: Seen) -> str:
    """How rows are read, by what was compiled."""
    names, attributes = list(seen.kernel.src.signature), seen.kernel.src.attrs
    divisible = {names[index] for (index, *_), found in attributes.items() if ["tt.divisibility", 16] in found}
    if seen.arguments.get("TMA"):
        return "descriptors"
    return "vectors" if {"x_stride_row", "u_stride_row", "w_stride_row", "h_stride_row"} & divisible else "scalars"


def place(seen: Seen) -> str:
    """Where a gradient is written."""
    x, u = (seen.arguments.get(name) for name in ("x_ptr", "u_ptr"))
    return "none" if u is None else "in place" if u is x else "apart"


def test_arguments_arrive(all_seen: list[Seen]) -> None:
    """As many as the binary has, each at its place, of its size, with its value."""
    for seen in all_seen:
        assert len(seen.parameters) == len(seen.kernel.run.kernel_signature) + 2, seen.name  # what the launcher counts
        assert [len(one) for one in seen.parameters] == seen.launch.function.sizes, seen.name
        assert seen.launch.parameters == seen.parameters, seen.name


def parameters(kernel: Any, arguments: dict[str, Any], maps: list[TensorMap]) -> Iterator[bytes]:
    """What a kernel must be given; each descriptor must have been made of its own tensor."""
    formats = {"i32": "<i", "i64": "<q", "fp32": "<f"}
    remaining = iter(maps)
    for name, kind in kernel.src.signature.items():
        value = arguments[name]
        if kind == "constexpr":
            assert value is None or isinstance(value, bool) or value == 1 or name.isupper(), name
        elif isinstance(value, TensorDescriptor):
            one = next(remaining)
            assert one.address == value.base.data_ptr()
            yield one.content
            yield from (struct.pack("<i", size) for size in value.shape)
            yield from (struct.pack("<q", stride) for stride in value.strides)
        elif kind.startswith("*"):
            yield struct.pack("<Q", value.data_ptr())
        else:
            yield struct.pack(formats[kind], value)
    yield from 2 * [bytes(8)]  # scratch memory, of which none is asked for


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def score_grid(a: dict[str, Any]) -> tuple[int, ...]:
    columns = cdiv(a["vocabulary"], a["BLOCK_N"])
    return (cdiv(3, a["BLOCK_M"]) * cdiv(columns, cdiv(columns, score.MAX_SPLITS)),)


def tiles(a: dict[str, Any]) -> tuple[int, ...]:
    return (cdiv(a["vocabulary"], 1024),)


# Programs, for 3 rows; of others a program per row.
GRIDS: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = {
    "score.token_nll": score_grid,
    "score.reverse_kl": score_grid,
    "score.merge_token_nll": lambda a: (1,),
    "score.merge_reverse_kl": lambda a: (1,),
    "epilogue.product": score_grid,
    "epilogue.merge": lambda a: (1,),
    "sparse.column_squares": lambda a: (cdiv(a["vocabulary"], 1024), cdiv(3, SPLIT)),
    "sparse.count_columns": tiles,
    "sparse.list_columns": tiles,
    "sparse.hidden_gradient": lambda a: (cdiv(3, a["BLOCK_M"]) * cdiv(a["dim"], a["BLOCK_N"]),),
    "sparse.weight_gradient": lambda a: (2 * PROCESSORS,),
}


def test_programs(all_seen: list[Seen]) -> None:
    """Grid, threads, stream and shared memory; beyond 48 KB that was allowed first, or the stub had refused."""
    for seen in all_seen:
        one, metadata = seen.launch, seen.kernel.metadata
        grid = GRIDS.get(seen.name, lambda _: (3,))(seen.arguments)
        assert one.grid == (*grid, 1, 1)[:3], seen.name
        assert one.block == (32 * seen.arguments["num_warps"], 1, 1), seen.name
        assert one.shared_memory == metadata.shared
        assert one.function.shared_memory >= max(SMALL_SHARED_MEMORY, metadata.shared)
        assert one.attributes == 0
        assert one.stream == STREAM + ARCHS.index(metadata.target.arch)
        assert 32 * seen.arguments["num_warps"] * seen.kernel.n_regs <= 65536
    assert any(seen.launch.shared_memory > SMALL_SHARED_MEMORY for seen in all_seen)


def test_descriptors_are_of_their_tensors(all_seen: list[Seen]) -> None:
    """Rows of 128 bytes, as wide as a swizzle, of blocks that are the program's."""
    types = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
    count = 0
    for seen in all_seen:
        values = [seen.arguments[name] for name in seen.kernel.src.signature]
        descriptors = [value for value in values if isinstance(value, TensorDescriptor)]
        for descriptor, one in zip(descriptors, seen.maps, strict=True):
            base, (rows, columns) = descriptor.base, descriptor.block_shape
            assert one.type == types[base.dtype]
            assert one.sizes == tuple(reversed(base.shape))
            assert one.strides == (base.stride(0) * base.itemsize,)
            assert one.box == (min(columns, 128 // base.itemsize), rows)
            assert one.swizzle == 3
            count += 1
    assert count == 2 + 4 + 2 * 3  # the product without logits is launched twice


def refused_map(address: int = 2**40, stride: int = 1024, box: tuple[int, int] = (64, 128), swizzle: int = 3) -> bool:
    """Of a bf16 tensor [16, 512]."""
    sizes, strides = (ctypes.c_uint64 * 2)(512, 16), (ctypes.c_uint64 * 1)(stride)
    sides, steps, room = (ctypes.c_uint32 * 2)(*box), (ctypes.c_uint32 * 2)(1, 1), ctypes.create_string_buffer(256)
    place = -(-ctypes.addressof(room) // 64) * 64
    pointers = [ctypes.addressof(array) for array in (sizes, strides, sides, steps)]
    return StubCuda(ARCHS).cuTensorMapEncodeTiled([place, 9, 2, address, *pointers, 0, swizzle, 2, 0]) != 0


def test_the_stub_refuses_what_a_device_refuses() -> None:
    assert not refused_map()
    assert refused_map(address=2**40 + 8)
    assert refused_map(stride=1026)
    assert refused_map(stride=512)
    assert refused_map(box=(64, 512))
    assert refused_map(box=(128, 128))
    assert refused_map(box=(64, 128), swizzle=2)
    stub = StubCuda(ARCHS)
    stub.context = 1 + ARCHS.index(80)
    assert stub.cuFuncSetAttribute([1, 8, 200 * 1024]) != 0
