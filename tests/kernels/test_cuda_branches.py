"""The host's CUDA branches, driven on a CPU: every loss, forward and backward, on tensors that say they are on a GPU.

They have no memory. PyTorch checks shapes, dtypes and devices of its own operators, `fake_kernels.py` those of the kernels.
Whatever made the host wait for a device would raise. Triton's launcher itself is in test_launching.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import loss_cases
import pytest
import torch
from determinism import RefusesNonDeterminism, without_operators
from fake_cuda import Machine
from fake_kernels import FakeKernels
from loss_cases import DIVERGENCES, LISTS, LOSSES, NEEDS, WAYS, fused_output, unreduced
from problem import Problem, make_problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.variants.fake_cuda import fake_tensors
from fastkl import loss
from fastkl._loss.arguments import check_reduction
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.operators import autograd
from fastkl.kernels.operators.records import pack
from fastkl.kernels.sparse import estimator
from fastkl.loss import Sparse

SHAPE, V, D = (2, 24), 320, 48
CUT = 301  # an odd vocabulary
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Context:
    """What autograd gives a function, for one whose tensors no engine takes: it has no device for them."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(t, Tensor) and t.requires_grad for t in arguments)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class Call(NamedTuple):
    function: Any
    context: Context
    results: tuple[Tensor, ...]

    def backward(self) -> tuple[Tensor | None, ...]:
        """The gradients of hidden, weight and bias."""
        with torch.no_grad():
            return self.function.backward(self.context, *map(torch.empty_like, self.results))[2:5]


class Device:
    """A loss's calls on a device, and what its operators and kernels were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        self.machine = Machine(monkeypatch, 90)
        self.kernels = FakeKernels(monkeypatch, dtype)
        self.products = Products(dtype)
        self.calls: list[Call] = []
        without_operators(monkeypatch)
        monkeypatch.setattr(autograd, "_apply", self.apply)

    def apply(self, function: Any, problem: Any, weight_grad: Tensor | None) -> tuple[Tensor, ...]:
        tensors, *others = pack(problem)
        context = Context((others, weight_grad, *tensors))
        with torch.no_grad():
            results = function.forward(context, others, weight_grad, *tensors)
        self.calls.append(Call(function, context, results))
        return tuple(results)


class Products(RefusesNonDeterminism):
    """Refuses products that a GPU would refuse, or make in another way than they are meant."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(values=False)
        self.dtype, self.into_fp32, self.wide = dtype, 0, 0
        self.large: Counter[str] = Counter()  # operators that give logits, or a gradient, of all tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, Tensor) and result.shape == (SHAPE[0] * SHAPE[1], V) and not func.is_view:
            self.large[func.overloadpacket.__name__] += 1
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.check(func, [t for t in args if isinstance(t, Tensor)][-2:], args, result)
        return result

    def check(self, func: Any, operands: list[Tensor], args: Any, result: Tensor) -> None:
        """The operands of a head's products have its dtype; 16 bits go into float32 by `out_dtype`."""
        first, second = operands
        assert first.dtype == second.dtype == self.dtype, func
        assert result.dtype == compute_dtype(self.dtype), func
        assert result.is_cuda
        assert any(t.stride(-1) == 1 or t.stride(-2) == 1 for t in operands)
        for t in (*operands, result):
            if (
                t.numel() == SHAPE[0] * SHAPE[1] * CUT and t.stride(t.shape.index(CUT)) == 1
            ):  # logits, or their gradient
                assert t.stride(1 - t.shape.index(CUT)) % 64 == 0, func
                self.wide += 1
        if self.dtype in (BF16, FP16):
            assert func._overloadname.startswith("dtype"), func
            assert args[2 if func.overloadpacket.__name__ == "mm" else 3] == FP32
            self.into_fp32 += 1


def on_device(p: Problem) -> Problem:
    """As empty as they are, of the same shapes and dtypes."""
    return Problem(*[None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in p])


def empty_list(p: Problem, k: int = 4, padded: int = 0) -> tuple[Tensor, Tensor]:
    """In place of `loss_cases.teacher_list`, which finds one in float64."""
    return torch.empty(*SHAPE, k, dtype=torch.int64, device="cuda"), torch.empty(*SHAPE, k, device="cuda")


def evaluate(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: torch.dtype,
    needs: tuple[str, ...],
    model: torch.dtype | None = None,
    has_bias: bool = True,
    vocabulary: int = V,
    **options: Any,
) -> Device:
    """Forward and backward with operands of `dtype`, with every result checked; under autocast the model has another."""
    monkeypatch.setattr(loss_cases, "teacher_list", empty_list)
    plain, device = make_problem(SHAPE, vocabulary, D, model or dtype), Device(monkeypatch, dtype)
    with fake_tensors(), device.products:
        p = on_device(plain if has_bias else plain._replace(bias=None, teacher_bias=None))
        for field in needs:
            getattr(p, field).requires_grad_()
        if isinstance(logits := options.get("teacher_logits"), torch.dtype):
            options["teacher_logits"] = torch.empty(*SHAPE, V, dtype=logits, device="cuda")
        output = fused_output(name, p, **{"skip_zero_rows": False, **options})
        check_output(output, p, dtype, reduced=name != "linear_logprobs" and options.get("reduction") != "none")
        own = p._asdict() | {
            field: t[: options.get("vocab_size")]
            for field in ("weight", "bias")
            if (t := getattr(p, field)) is not None
        }
        for call in device.calls:
            for field, gradient in zip(("hidden", "weight", "bias"), call.backward(), strict=True):
                check_gradient(own[field], gradient, dtype, field in needs)
    assert len(device.calls) == (1 if needs else 0)
    return device


def check_output(output: loss.LossOutput, p: Problem, dtype: torch.dtype, reduced: bool) -> None:
    found = [output.loss, *output.metrics.values()]
    assert output.loss.shape == (() if reduced else SHAPE)
    assert all(t.shape == () for t in output.metrics.values())
    if output.logprobs is not None:
        assert output.logprobs.shape == SHAPE
        found.append(output.logprobs)
    assert all(t.is_cuda and t.dtype == compute_dtype(dtype) for t in found)


def check_gradient(tensor: Tensor | None, gradient: Tensor | None, dtype: torch.dtype, wanted: bool) -> None:
    assert (gradient is not None) == wanted
    if gradient is not None and tensor is not None:
        flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor  # the rows, as the operators see them
        assert (gradient.shape, gradient.dtype, gradient.device) == (flat.shape, dtype, flat.device)


each_dtype = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
each_need = pytest.mark.parametrize("needs", [(), *NEEDS.values()], ids=["values", *NEEDS])


SCORED = ("linear_logprobs", "policy_gradient", "entropy", "sampled_reverse_kl", "reverse_kl")


@each_need
@each_dtype
@pytest.mark.parametrize("name", WAYS)
def test_ways(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, needs: tuple[str, ...]) -> None:
    """Where no gradient is wanted yet, 16-bit heads are scored without logits; else they go into float32."""
    device = evaluate(monkeypatch, name, dtype, needs)
    later = name == "linear_logprobs" and needs[-1:] == ("bias",)
    scored = any(kernel.startswith("score.") for kernel in device.kernels.launched)
    assert scored == (dtype == BF16 and name in SCORED and (not needs or later))
    assert (device.products.into_fp32 > 0) == (dtype == BF16 and (bool(needs) or not scored))
    assert len(device.kernels.launched) > 0


@pytest.mark.parametrize("dtype", [FP16, FP64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    """float64 goes to PyTorch alone."""
    device = evaluate(monkeypatch, name, dtype, NEEDS["all"])
    assert bool(device.kernels.launched) == (dtype == FP16)


TEACHERS = {"teacher's logits": FP32, "teacher's 16-bit logits": BF16}
ROOM = {"empty", "new_empty", "empty_like"}


@pytest.mark.parametrize("has_bias", [False, True], ids=["frozen", "trained-with-bias"])
@pytest.mark.parametrize("name", [*LOSSES, *TEACHERS])
def test_no_pass_over_the_logits(monkeypatch: pytest.MonkeyPatch, name: str, has_bias: bool) -> None:
    """But for products and kernels of rows, and a teacher's logits that are copied: whatever temperature and scale."""
    options = {"temperature": 0.7, "logit_scale": 1.6}
    if name in TEACHERS:
        options["teacher_logits"] = TEACHERS[name]
    needs, loss_name = NEEDS["all" if has_bias else "frozen-head"], "jsd" if name in TEACHERS else name
    device = evaluate(monkeypatch, loss_name, BF16, needs, has_bias=has_bias, **options)
    heads = 2 if name in DIVERGENCES else 1
    others = {"mul": 1} if name in TEACHERS else {"scatter_": 2} if name in LISTS else {}  # of the list's entries
    assert {k: v for k, v in device.products.large.items() if k not in ROOM} == {"addmm": heads, **others}


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}-none": (name, {"reduction": "none"}) for name in ("policy_gradient", "entropy", "reverse_kl", "top_k")},
    "chunks": ("jsd", {"chunk_size": 20}),
    "head": ("policy_gradient", {"temperature": 0.7, "logit_scale": 1.6, "softcap": 2.5}),
    "teacher's head": ("reverse_kl", {"teacher_temperature": 0.7, "teacher_softcap": 2.5, "per_token": True}),
    "vocab_size": ("forward_kl", {"vocab_size": CUT}),
    "discount": ("sampled_reverse_kl", {"discount": 0.9}),
    "sequences": ("policy_gradient", {"ratio": "sequence", "reduction": "sequence_mean"}),
    "bounds": ("reference_kl", {"ratio_bounds": (0.5, 2.0), "method": "ppo", "ref_kl": "k2"}),
    "sequence bounds": ("reference_kl", {"ratio_bounds": (0.5, 2.0), "ratio": "sequence", "truncate_ratio": 1.5}),
    "hard": ("jsd", {"hard_coef": 0.5, "temperature": 2.0, "per_token": True}),
    "hard-top_k": ("top_k", {"hard_coef": 0.5, "temperature": 2.0}),
    "hard-sampled_tail": ("sampled_tail", {"hard_coef": 0.5, "temperature": 2.0}),
    "sampled_tail-none": ("sampled_tail", {"reduction": "none", "vocab_size": CUT}),
    "drop": ("top_k", {"direction": "forward", "tail": "drop", "squared_temperature": True, "temperature": 0.5}),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], backend: str) -> None:
    device = evaluate(monkeypatch, name, BF16, NEEDS["all"], backend=backend, **options)
    assert bool(device.kernels.launched) == (backend == "auto")


def test_a_normalizer_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_tensors():
        zero, count = (torch.empty((), device="cuda") for _ in range(2))
        reduction = check_reduction("mean", zero, zero)
        reduction.check_count(count)
        assert reduction.factor(count).is_cuda


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@each_dtype
@pytest.mark.parametrize("name", ["policy_gradient", "reverse_kl", "top_k", "sampled_tail"])
def test_sparse(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, needs: tuple[str, ...]) -> None:
    """The weight's gradient too comes from kernels; nothing is waited for."""
    monkeypatch.setattr(estimator, "BLOCK_ROWS", {"cpu": 16, "accelerator": 16})
    device = evaluate(monkeypatch, name, dtype, needs, backward=Sparse(1), softcap=3.0)
    launched = set(device.kernels.launched)
    assert {"sparse.column_squares", "sparse.count_columns", "sparse.list_columns", "sparse.compact"} <= launched
    assert ("sparse.hidden_gradient" in launched) == ("hidden" in needs)
    assert ("sparse.weight_gradient" in launched) == ("weight" in needs)


@pytest.mark.parametrize("entropy_grad", [True, False])
@each_need
@each_dtype
def test_token_stats(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, needs: tuple[str, ...], entropy_grad: bool
) -> None:
    """Scored without logits in 16 bits, but where the forward pass makes a unit gradient."""
    plain, device = make_problem(SHAPE, V, D, dtype), Device(monkeypatch, dtype)
    with fake_tensors(), device.products:
        p = on_device(plain)
        for field in needs:
            getattr(p, field).requires_grad_()
        own = {"bias": p.bias, "skip_zero_rows": False, "entropy_grad": entropy_grad, "softcap": 3.0}
        stats = loss.linear_token_stats(p.hidden, p.weight, p.tokens, **own)
        assert all(t.is_cuda and t.shape == SHAPE for t in stats)
        assert [t.dtype for t in stats] == [compute_dtype(dtype)] * 3 + [torch.bool]
        scored = any(kernel.startswith("score.") for kernel in device.kernels.launched)
        assert scored == (dtype == BF16 and (entropy_grad or needs != NEEDS["frozen-head"]))
        for call in device.calls:
            for field, gradient in zip(("hidden", "weight", "bias"), call.backward(), strict=True):
                check_gradient(getattr(p, field), gradient, dtype, field in needs)
    assert len(device.calls) == (1 if needs else 0)


@pytest.mark.parametrize("backward", ["exact", Sparse(1)], ids=["exact", "sparse"])
@each_dtype
@pytest.mark.parametrize("name", ["policy_gradient", "entropy", "reverse_kl", "top_k"])
def test_rows_of_an_odd_vocabulary_are_aligned(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, backward: Any
) -> None:
    """Products, of logits, both gradients and a teacher's logits, refuse others; so do kernels (`fake_kernels.py`)."""
    device = evaluate(monkeypatch, name, dtype, NEEDS["all"], vocabulary=CUT, backward=backward)
    assert device.products.wide >= 1 + 2 * (backward == "exact") + (name == "reverse_kl")


class Scores(TorchDispatchMode):
    """Notes the dtypes of whatever an operation gives back that has a number for each row and word."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        found = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor) and t.is_cuda]
        self.dtypes |= {t.dtype for t in found if t.dim() == 2 and t.shape[0] > 3 and t.shape[1] >= V}
        return out


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_epilogue_leaves_no_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, needs: tuple[str, ...]
) -> None:
    """What there is of the size of logits has 16 bits. A loss that it is not made for has them."""
    for name, backend, expected in (
        ("policy_gradient", "epilogue", {dtype}),
        ("policy_gradient", "auto", {dtype, FP32}),
        ("entropy", "epilogue", {dtype, FP32}),
    ):
        with monkeypatch.context() as patch, Scores() as scores:
            device = evaluate(patch, name, dtype, needs, backend=backend, softcap=2.5)
        assert scores.dtypes == expected
        assert ("epilogue.product" in device.kernels.launched) == (expected == {dtype})


class AnywhereGenerator(torch.Generator):
    """Of a device that is not there."""

    def __new__(cls, device: torch.device | str = "cpu") -> AnywhereGenerator:
        return super().__new__(cls)


@each_dtype
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_where_the_host_waits(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype) -> None:
    """For the number of rows that take part, and for that of the columns that are kept: then it goes on as with any."""
    rows = 2 * SHAPE[1] - 5
    monkeypatch.setattr(
        FakeTensor, "nonzero", lambda t: torch.zeros(min(rows, t.numel()), 1, dtype=torch.int64, device="cuda")
    )
    monkeypatch.setattr(FakeTensor, "tolist", lambda t: [7, 7.0])
    monkeypatch.setattr(FakeTensor, "__bool__", lambda t: True)
    monkeypatch.setattr(FakeTensor, "__float__", lambda t: 7.0)
    monkeypatch.setattr(torch, "Generator", AnywhereGenerator)
    for name in ("linear_logprobs", "policy_gradient", "reverse_kl"):
        composed = unreduced(name) | {"backward": Sparse(1)}
        for options in ({"skip_zero_rows": True}, composed, composed | {"skip_zero_rows": True}):
            evaluate(monkeypatch, name, dtype, NEEDS["all"], backend=backend, **options)


@pytest.mark.parametrize("name", ["policy_gradient", "reverse_kl"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_under_autocast(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str) -> None:
    """A float32 model has its products in 16 bits, into float32."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would look for a device first
    try:
        device = evaluate(monkeypatch, name, dtype, NEEDS["all"], model=FP32)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    assert device.products.into_fp32 > 0


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_functions_without_a_gradient(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    plain, device = make_problem(SHAPE, V, D, dtype), Device(monkeypatch, dtype)
    with fake_tensors(), device.products:
        p = on_device(plain)
        ids, logprobs = loss.linear_top_k(p.hidden, p.weight, 7, bias=p.bias, chunk_size=20, softcap=2.0)
        listed = loss.linear_list_logprobs(p.hidden, p.weight, ids, bias=p.bias, chunk_size=20, softcap=2.0)
        ranks = loss.linear_ranks(p.hidden, p.weight, p.tokens, bias=p.bias, vocab_size=300)
        advantages = loss.reverse_kl_advantages(p.sampler_logprobs, p.teacher_logprobs, discount=0.5, power=0.5)
        centred = loss.centred_advantages(advantages, p.mask)
        past = loss.extrapolated_advantages(p.sampler_logprobs, p.teacher_logprobs, p.teacher_logprobs, extrapolate=2.0)
    assert (ids.shape, ids.dtype, logprobs.dtype) == ((*SHAPE, 7), torch.int64, compute_dtype(dtype))
    assert (listed.shape, listed.dtype) == ((*SHAPE, 7), compute_dtype(dtype))
    assert (ranks.shape, ranks.dtype) == (SHAPE, torch.int64)
    for found in (advantages, centred, past):
        assert (found.shape, found.dtype) == (SHAPE, p.sampler_logprobs.dtype)
    assert all(t.is_cuda for t in (ids, logprobs, listed, ranks, advantages, centred, past))
