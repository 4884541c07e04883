"""The counted work of each plan is what the driver does, and what torch's FLOP counter sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Machine
from fake_kernels import FakeKernels
from loss_cases import fused
from problem import Problem, make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import main
from bench.commands.count import FORMS, SHAPES, count, units
from bench.lib.measure import peak_allocated
from bench.lib.report import read_result
from bench.variants.fake_cuda import fake_tensors
from fastkl.kernels import driver, workspace
from fastkl.kernels.gemm import TILE_COLUMNS
from fastkl.kernels.operators import autograd
from fastkl.kernels.operators.flops import gemm_flops
from fastkl.kernels.problem import HeadOptions, Inputs, Needs, RowLoss, Spec

N, D, V = 10, 5, 3001
SPEC = Spec("token_nll", HeadOptions())
forms = pytest.mark.parametrize("form", FORMS)
teachers = pytest.mark.parametrize("teacher", [False, True], ids=["alone", "teacher"])


def problem(form: str) -> Problem:
    """Every row takes part, and the teacher is as wide as the student."""
    p = make_problem((N,), V, D, dtype=torch.float32)
    p = p._replace(bias=None, teacher_bias=None, teacher_hidden=p.hidden, teacher_weight=p.weight)
    p = p._replace(tokens=p.tokens.clamp(min=0), mask=None, advantages=p.advantages.abs() + 1)
    return p.leaves({"values": (), "frozen": ("hidden",)}.get(form, ("hidden", "weight")))


def evaluate(form: str, teacher: bool, p: Problem, **options: Any) -> None:
    """The form as a user gets it."""
    options |= {"reduction": "none"} if form == "composed" else {}
    value = fused("reverse_kl" if teacher else "policy_gradient", p, **options)
    if form != "values":
        value.sum().backward()


@pytest.fixture(autouse=True)
def by_way_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is counted. A CPU scores without, as a GPU does with 16-bit heads."""
    monkeypatch.setattr(driver, "scorer", lambda spec, inputs: None)


@forms
@teachers
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_flops_are_those_of_the_driver(
    gemms: dict[str, list[int]], form: str, teacher: bool, chunk_size: int | None
) -> None:
    evaluate(form, teacher, problem(form), chunk_size=chunk_size)
    rows = sum(sum(calls) for calls in gemms.values())
    counted = count(form, (N, D, V), torch.float32, teacher, chunk_size, "cpu")
    assert counted.flops == 2 * rows * D * V
    assert max(gemms["project"]) == counted.chunk_rows


@forms
@teachers
def test_torch_counts_the_same(form: str, teacher: bool) -> None:
    p = problem(form)
    with FlopCounterMode(display=False) as counter:
        evaluate(form, teacher, p)
    assert counter.get_total_flops() == count(form, (N, D, V), torch.float32, teacher, device="cpu").flops


def test_torch_counts_a_narrower_teacher() -> None:
    p = make_problem((N,), V, D, dtype=torch.float32).leaves(("hidden",))
    with FlopCounterMode(display=False) as counter:
        fused("reverse_kl", p).backward()
    assert counter.get_total_flops() == gemm_flops(N, V, D, teacher_hidden=D + 2, gradients=1)


@forms
@teachers
def test_bytes_are_those_of_the_products(monkeypatch: pytest.MonkeyPatch, form: str, teacher: bool) -> None:
    moved = 0

    def spy(name: str) -> None:
        module = workspace if name == "project" else driver
        original: Callable[..., Tensor | None] = getattr(module, name)

        def counted(*args: Any, **options: Any) -> Tensor | None:
            nonlocal moved
            result = original(*args, **options)
            matrices = [t for t in (*args, result) if isinstance(t, Tensor) and t.dim() == 2]
            if name == "add_weight_gradient" and not options["overwrite"]:
                matrices.append(args[0])  # read before it is written
            moved += sum(t.numel() * t.element_size() for t in matrices)
            return result

        monkeypatch.setattr(module, name, counted)

    for name in ("project", "hidden_gradient", "add_weight_gradient"):
        spy(name)
    evaluate(form, teacher, problem(form), chunk_size=4)
    assert moved == count(form, (N, D, V), torch.float32, teacher, 4, "cpu").gemm_bytes


@forms
@teachers
def test_workspace_is_what_is_allocated(form: str, teacher: bool) -> None:
    """Beside it: tensors of the size of an input, a tile, and a block's product and mask in PyTorch's divergence."""
    p, chunk = problem(form), 5
    workspace = count(form, (N, D, V), torch.float32, teacher, chunk, "cpu").workspace
    assert workspace == 4 * chunk * V * (1 + teacher)
    thin = 4 * 4 * (N + V) * D * (form in ("trainable", "composed")) + 4096
    block = (4 + 1) * chunk * V * teacher + 4 * chunk * TILE_COLUMNS
    peak = peak_allocated(lambda: evaluate(form, teacher, p, chunk_size=chunk), torch.device("cpu"))
    assert workspace <= peak <= workspace + block + thin


def test_on_a_gpu_the_gradient_of_bf16_lies_apart() -> None:
    counted = count("frozen", (4096, 64, 1000), chunk_size=1024)
    assert counted.workspace == 1024 * 1024 * (4 + 2)  # rows of 1000 logits have room for 1024
    assert counted.rows.bytes == 4096 * 1000 * (4 + 2)  # in one walk
    assert counted.passes == 2
    assert count("frozen", (4096, 64, 1000), torch.float16).passes == 3


class Moved(TorchDispatchMode):
    """What products multiply and move, and what other passes over as many numbers as a chunk or a weight has move."""

    def __init__(self, least: int) -> None:
        self.least, self.flops, self.gemm_bytes, self.others = least, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, tensors = func.overloadpacket.__name__, [t for t in args if isinstance(t, Tensor)]
        large = [t for t in tensors if t.numel() >= self.least]
        if name in ("mm", "addmm"):
            first, second = tensors[-2:]
            added = tensors[:-2] if (kwargs or {}).get("beta", 1) != 0 else []
            moved = sum(t.numel() * t.itemsize for t in (first, second, *added, result))
            if first.shape[0] > 3:
                self.flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
                self.gemm_bytes += moved
            else:  # the gradient of a bias
                self.others += second.numel() * second.itemsize
        elif large and func.namespace == "aten" and not func.is_view and name not in ("new_empty", "empty_like"):
            written = [result] if isinstance(result, Tensor) and result.numel() >= self.least else []
            self.others += sum(t.numel() * t.itemsize for t in (*large, *written))
        return result


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@teachers
@pytest.mark.parametrize("form", ["frozen", "trainable"])
@pytest.mark.parametrize("shape", [SHAPES["Qwen3-8B"], (3000, 896, 151665)], ids=str)
def test_count_is_what_the_driver_does_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], form: str, teacher: bool, bias: bool
) -> None:
    """At the size of a model, on tensors without memory, a sparse backward apart."""
    n, d, vocabulary = shape
    Machine(monkeypatch, 90)
    FakeKernels(monkeypatch, torch.bfloat16)
    with fake_tensors(), Moved(min(n, d) * vocabulary // 16) as moved, torch.no_grad():
        head = [torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in ((n, d), (vocabulary, d), (vocabulary,))]
        head[2:] = head[2:] if bias else [None]
        tokens = torch.empty(n, dtype=torch.int64, device="cuda")
        inputs = Inputs(*head, tokens, *(head if teacher else []))
        spec = Spec("divergence", HeadOptions(), HeadOptions(), variant="reverse_kl") if teacher else SPEC
        needs = Needs(True, form == "trainable", bias and form == "trainable")
        values, _, gradients = driver.evaluate_with_gradients(spec, inputs, RowLoss(), needs)
        upstream = values.new_empty(())
        for gradient in gradients[:2]:
            autograd._finished(gradient, upstream, torch.bfloat16)
    counted = count(form, shape, teacher=teacher, bias=bias)
    assert moved.flops == counted.flops
    assert moved.gemm_bytes == counted.gemm_bytes
    thin = (2 * 2 + 3 * 4) * 3 * n * d  # what is left out
    assert counted.others <= moved.others <= counted.others + thin


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_tile_is_padded(shape: tuple[int, int, int]) -> None:
    """These vocabularies are multiples of 128, and so are all chunks."""
    for form in FORMS:
        for teacher in (False, True):
            counted = count(form, shape, teacher=teacher)
            assert counted.tile_flops == counted.flops
            assert counted.accumulator_passes == (3 if form in ("trainable", "composed") else 0)
    ragged = count("frozen", (shape[0], shape[1], 151665), chunk_size=100)
    assert ragged.tile_flops > 1.2 * ragged.flops


@pytest.mark.parametrize("kept", [0.01, 0.05, 0.2, 1.0])
@teachers
def test_a_sample_has_its_part_of_the_products(teacher: bool, kept: float) -> None:
    shape = (4096, 512, 10000)
    unit, heads = gemm_flops(shape[0], shape[2], shape[1]), 1 + teacher
    assert count("frozen", shape, teacher=teacher, kept=kept).flops == pytest.approx((heads + kept) * unit)
    trainable = count("trainable", shape, teacher=teacher, kept=kept)
    assert trainable.flops == pytest.approx((heads + 2 * kept) * unit)
    # Of four blocks as many are held as have room in V · D numbers: 512 / (1024 · kept); the others are computed again.
    again = {0.01: 0, 0.05: 0, 0.2: 2, 1.0: 4}[kept] / 4
    composed = count("composed", shape, teacher=teacher, kept=kept)
    assert composed.flops == pytest.approx((heads * (1 + again) + 2 * kept) * unit)
    assert composed.passes == pytest.approx(
        ((5 if teacher else 2) + 2 + kept) * (1 + again)
        + 2 * kept * (1 - again)  # what is held is read and written once more
    )


def test_bytes_of_a_sample_on_a_gpu() -> None:
    """bf16: per block a pass for the squares and one for compaction, K columns written, and vectors over V."""
    n, d, vocabulary, kept = 2048, 64, 1000, 0.1
    exact, ours = (count("trainable", (n, d, vocabulary), kept=k) for k in (None, kept))
    vectors = 2 * 4 * vocabulary * (2 * 8 + 1 + 2 + 2 * kept)  # two blocks, each of 8 splits of 128 rows
    assert ours.rows.bytes - exact.rows.bytes == n * vocabulary * 2 * (2 + kept) + vectors
    weight_rows, operands = 2 * 100 * d, n * 100 * 2 + n * d * 2
    assert ours.gemms[1].bytes == operands + weight_rows * 2
    assert ours.gemms[2].bytes == operands + weight_rows * 2 * 4 + vocabulary * d * 4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_estimate_is_below_the_gemms(shape: tuple[int, int, int]) -> None:
    for form in FORMS:
        counted = count(form, shape)
        low, high = units(counted, shape)
        assert counted.flops / gemm_flops(shape[0], shape[2], shape[1]) <= low <= high


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_a_sample_saves_grows_with_what_it_leaves_out(shape: tuple[int, int, int]) -> None:
    for form in ("frozen", "trainable", "composed"):
        low, high = zip(*(units(count(form, shape, kept=kept), shape) for kept in (0.01, 0.1, 0.5)), strict=True)
        assert (low, high) == (tuple(sorted(low)), tuple(sorted(high)))
        exact = units(count(form, shape), shape)
        assert (low[0], high[0]) < exact


def test_report_of_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "count.json"
    main(["count", "--shape", "8192,4096,151936", "--kept", "0.05,0.2", "--json", str(file)])
    rows = {row["form"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["frozen"]["kept"] is None
    assert rows["trainable, 5 % kept"]["kept"] == 0.05
    assert rows["trainable, 5 % kept"]["gemm_units"] == pytest.approx(1.1)
    assert rows["composed + teacher, 20 % kept"]["gemm_units"] == pytest.approx(2.4)
    assert len(rows) == 8 + 2 * 2 * 3
    for wrong in ("0", "1.5", "a", "0.1,"):
        with pytest.raises(SystemExit):
            main(["count", "--kept", wrong])
    assert "no list of fractions" in capsys.readouterr().err


def test_without_logits(tmp_path: Path) -> None:
    """What leaves the product are 16 bits of each logit; there is no row pass, and twice the rows per byte of room."""
    n, d, vocabulary = 8192, 2048, 151936
    for form in ("frozen", "trainable"):
        ordinary, ours = (count(form, (n, d, vocabulary), backend=backend) for backend in ("auto", "epilogue"))
        assert (ours.rows.bytes, ours.passes) == (0, 0)
        assert ours.flops == ordinary.flops
        assert ours.chunk_rows > 2 * ordinary.chunk_rows
        for less, more in zip(*(units(one, (n, d, vocabulary)) for one in (ours, ordinary)), strict=True):
            assert less < more - 0.2
    file = tmp_path / "count.json"
    main(["count", "--shape", "8192,4096,151936", "--epilogue", "--json", str(file)])
    rows = {row["form"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["frozen, epilogue"]["gemm_units"] == 2
    assert rows["trainable, epilogue"]["workspace_mb"] > rows["frozen, epilogue"]["workspace_mb"]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "count.json"
    main(["count", "--shape", "8192,4096,151936", "--json", str(file)])
    rows = {row["form"]: row for row in json.loads(file.read_text())["rows"]}
    assert [row["gemm_units"] for row in rows.values()] == [1, 2, 3, 4, 2, 3, 4, 6]
    assert "counted, not measured" in capsys.readouterr().out


def test_the_committed_count_is_that_of_the_code(tmp_path: Path) -> None:
    """docs/speed/speed.md is made from it."""
    file = tmp_path / "counted.json"
    main(["count", "--bias", "--json", str(file)])
    command = "python -m bench count --bias --json bench/results/counted.json, then python -m bench table --write"
    assert json.loads(file.read_text()) == read_result("counted"), f"run: {command}"
