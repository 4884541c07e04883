"""What `fastkl.integrations.trl` puts in the place of TRL's functions: the same values, and where they are found."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from typing import Any

import pytest
import torch
from groups import alone_in_group
from launches import run_python
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

trl = pytest.importorskip("trl", minversion="1.16")
from trl.trainer import distillation_trainer, utils  # noqa: E402

from fastkl import reference  # noqa: E402
from fastkl.integrations import trl as integration  # noqa: E402

VOCABULARY, DIM, TEACHER_DIM = 53, 16, 24
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # the order of TRL's fields
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def functions() -> tuple[Any, Any]:
    """What is in place: the divergence, and the autograd function of the fused head."""
    return distillation_trainer._chunked_divergence_loss, utils._ChunkedLogProbFunction


def both(name: str) -> tuple[Any, Any]:
    """TRL's function and ours."""
    index = ("divergence", "head").index(name)
    theirs = functions()[index]
    with integration.use():
        ours = functions()[index]
    assert ours is not theirs
    return (theirs, ours) if index == 0 else (theirs.apply, ours.apply)


class Heads:
    """A student and a teacher on 2 × 9 tokens, with logits of standard deviation 2."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, bias: bool = True, weight_dtype: torch.dtype | None = None
    ):
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = weight_dtype or dtype) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).to(dtype)

        self.hidden = normal(2, 9, DIM, dtype=dtype).requires_grad_()
        self.teacher_hidden = normal(2, 9, TEACHER_DIM, dtype=dtype)
        self.weight = normal(VOCABULARY, DIM, scale=2 / DIM**0.5).requires_grad_()
        self.teacher_weight = torch.nn.Parameter(normal(VOCABULARY, TEACHER_DIM, scale=2 / TEACHER_DIM**0.5))
        self.bias = normal(VOCABULARY).requires_grad_() if bias else None
        self.teacher_bias = torch.nn.Parameter(normal(VOCABULARY)) if bias else None
        self.tokens = torch.randint(VOCABULARY, (2, 9), generator=g)
        self.mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1, 1]])

    @property
    def trained(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Zeros where TRL says that there is none."""
        found = torch.autograd.grad(loss, self.trained, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.trained, strict=True)]

    def double(self) -> Heads:
        """The same numbers in float64."""
        other = copy.copy(self)
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                setattr(other, name, tensor.detach().double().requires_grad_(tensor.requires_grad))
        return other

    def logits(self, who: str = "", **options: Any) -> Tensor:
        return reference.logits(*[getattr(self, f"{who}{name}") for name in ("hidden", "weight", "bias")], **options)


# A head's options by TRL's names, of the student, of the teacher, and of both.
HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scales": {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
    "softcaps": {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 5.0},
    "all": {
        "temperature": 1.6,
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 2.0,
        "student_final_logit_softcapping": 3.0,
        "teacher_final_logit_softcapping": 5.0,
    },
}


def divergence(function: Any, heads: Heads, beta: float, items: Any = None, **options: Any) -> Any:
    student, teacher = heads.hidden, heads.teacher_hidden
    weights = heads.weight, heads.teacher_weight
    biases = {"student_lm_head_bias": heads.bias, "teacher_lm_head_bias": heads.teacher_bias}
    return function(student, teacher, *weights, heads.mask, beta, items, **biases, **options)


@pytest.mark.parametrize("masked", ["some", "all", "none"])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(9)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_is_that_of_trl(beta: float, items: Any, masked: str) -> None:
    theirs, ours = both("divergence")
    for bias, options in itertools.product((False, True), HEAD_OPTIONS.values()):
        heads = Heads(bias=bias)
        heads.mask = {"some": heads.mask, "all": heads.mask * 0, "none": torch.ones_like(heads.mask)}[masked]
        expected = divergence(theirs, heads, beta, items, **options)
        found = divergence(ours, heads, beta, items, **options)
        torch.testing.assert_close(found, expected, **FLOAT32)
        torch.testing.assert_close(heads.gradients(found[0]), heads.gradients(expected[0]), **FLOAT32)


def exact_divergence(heads: Heads, beta: float, options: dict[str, Any]) -> Tensor:
    """As it is defined."""

    def of(who: str, prefix: str) -> Tensor:
        names = {"logit_scale": f"{prefix}_logit_scale", "softcap": f"{prefix}_final_logit_softcapping"}
        own = {name: options[theirs] for name, theirs in names.items() if theirs in options}
        return heads.logits(who, temperature=options.get("temperature", 1.0), **own)

    z, z_teacher = of("", "student"), of("teacher_", "teacher").detach()
    ends = {0.0: reference.forward_kl, 1.0: reference.reverse_kl}
    value = ends[beta](z, z_teacher) if beta in ends else reference.jsd(z, z_teacher, beta)
    return (value * heads.mask).sum() / heads.mask.sum()


def assert_no_further(heads: Heads, ours: Tensor, theirs: Tensor, exact: list[Tensor], precision: str) -> None:
    """From the exact value and gradients, in norm; roundings that nobody avoids may fall this way or that.

    A float32 head's bias and gradients are rounded to bfloat16 once, as F.linear's are under autocast, and TRL's are not.
    """
    factor, slack = (1.3, 1e-5) if precision == "bfloat16" else (2.5, 5e-4)

    def errors(loss: Tensor) -> list[float]:
        found = [loss.detach(), *heads.gradients(loss)]
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    by_us, by_trl = errors(ours), errors(theirs)
    assert all(e <= factor * t + slack for e, t in zip(by_us, by_trl, strict=True)), (by_us, by_trl)


# A hidden state in bfloat16 under a head in bfloat16; under one in float32; in float32 under autocast.
PRECISIONS = {"bfloat16": (torch.bfloat16, None, False), "float32-head": (torch.bfloat16, torch.float32, False)}
PRECISIONS["autocast"] = (torch.float32, None, True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", HEAD_OPTIONS.values(), ids=HEAD_OPTIONS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_in_bfloat16_the_divergence_is_no_further_from_the_truth(
    beta: float, options: dict[str, Any], precision: str
) -> None:
    theirs, ours = both("divergence")
    dtype, weight_dtype, autocast = PRECISIONS[precision]
    heads = Heads(dtype, weight_dtype=weight_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = (divergence(function, heads, beta, **options)[0] for function in (ours, theirs))
    double = heads.double()
    exact = exact_divergence(double, beta, options)
    assert_no_further(heads, found, expected, [exact.detach(), *double.gradients(exact)], precision)


def fields(function: Any, heads: Heads, outputs: tuple[str, ...], **options: Any) -> list[Tensor | None]:
    """As the fused head calls it: temperature, chunk size, soft-cap, scale by position."""
    inputs = heads.hidden.flatten(0, 1), heads.weight, heads.bias, heads.tokens.flatten()
    numbers = options.get("temperature", 1.0), 32768, options.get("softcap"), options.get("logit_scale", 1.0)
    return list(function(*inputs, *numbers, outputs))


FIELD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 3.0},
    "all": {"temperature": 1.6, "logit_scale": 2.0, "softcap": 3.0},
}
SUBSETS = [OUTPUTS[:1] + subset for k in range(5) for subset in itertools.combinations(OUTPUTS[1:], k)]


@pytest.mark.parametrize("options", FIELD_OPTIONS.values(), ids=FIELD_OPTIONS)
@pytest.mark.parametrize("outputs", SUBSETS, ids="-".join)
def test_the_fields_of_a_token_are_those_of_trl(outputs: tuple[str, ...], options: dict[str, Any]) -> None:
    """Each alone and all together. Log-probs and entropies have gradients, whatever comes from above."""
    theirs, ours = both("head")
    for bias, trained in itertools.product((False, True), ("all", "frozen")):
        heads = Heads(bias=bias)
        heads.tokens[0, :4] = heads.logits(**options).argmax(-1)[0, :4]
        if trained == "frozen":
            heads.weight.requires_grad_(False)
            heads.bias = heads.bias if heads.bias is None else heads.bias.detach()
        found, expected = fields(ours, heads, outputs, **options), fields(theirs, heads, outputs, **options)
        torch.testing.assert_close(found, expected, **FLOAT32)
        assert [t is not None and t.requires_grad for t in found] == [
            t is not None and t.requires_grad for t in expected
        ]
        above = torch.linspace(-1, 2, 18), torch.linspace(1, -1, 18)
        for weights in (above, above[:1]):
            loss = [
                sum((t * w).sum() for t, w in zip(f, weights, strict=False) if t is not None) for f in (found, expected)
            ]
            with_grad = [t for t in heads.trained if t.requires_grad]
            gradients = [torch.autograd.grad(value, with_grad, retain_graph=True) for value in loss]
            torch.testing.assert_close(gradients[0], gradients[1], **FLOAT32)


def test_a_frozen_head_costs_two_products_where_entropies_are_only_looked_at(gemms: dict[str, list[int]]) -> None:
    """As under LoRA. TRL's own code takes three."""
    _, ours = both("head")
    heads = Heads()
    heads.weight.requires_grad_(False)
    heads.bias = None
    logprobs, entropies, *_ = fields(ours, heads, ("log_probs", "entropy"))
    assert logprobs is not None
    assert entropies is not None
    (logprobs * entropies.detach()).sum().backward()
    assert {name: len(rows) for name, rows in gemms.items()} == {
        "project": 1,
        "hidden_gradient": 1,
        "add_weight_gradient": 0,
    }


def test_what_fastkl_refuses_is_left_to_trl() -> None:
    """A logit scale of 0, which makes every distribution flat."""
    theirs, ours = both("head")
    heads = Heads()
    found, expected = (fields(function, heads, OUTPUTS, logit_scale=0.0) for function in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    theirs, ours = both("divergence")
    found, expected = (divergence(function, heads, 0.5, student_logit_scale=0.0) for function in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_positions_are_a_differentiable_nothing() -> None:
    """On an accelerator TRL leaves out what is masked; that may be everything."""
    theirs, ours = both("head")
    heads = Heads()
    for function in (theirs, ours):
        none = function(heads.hidden.flatten(0, 1)[:0], heads.weight, heads.bias, heads.tokens.flatten()[:0], 1.0, 64)
        loss = none[0].sum() + none[1].sum()
        assert float(loss.detach()) == 0.0
        assert all(float(g.abs().sum()) == 0.0 for g in heads.gradients(loss))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", FIELD_OPTIONS.values(), ids=FIELD_OPTIONS)
def test_in_bfloat16_the_fields_are_no_further_from_the_truth(options: dict[str, Any], precision: str) -> None:
    theirs, ours = both("head")
    dtype, weight_dtype, autocast = PRECISIONS[precision]
    heads = Heads(dtype, weight_dtype=weight_dtype)
    double = heads.double()
    z = double.logits(**options).flatten(0, 1)
    log_p, above = z.log_softmax(-1), torch.linspace(-1, 2, 18)
    exact = [log_p.gather(-1, heads.tokens.flatten()[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), z.mean(-1)]
    outputs = ("log_probs", "entropy", "mean_logits")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = ([t for t in fields(f, heads, outputs, **options) if t is not None] for f in (ours, theirs))
    for index in range(2):
        truth = (exact[index] * above).sum()
        losses = [(values[index] * above).sum() for values in (found, expected)]
        wanted = [truth.detach(), *double.gradients(truth)]
        assert_no_further(heads, *losses, wanted, precision)
    worst = [float((values[2].double() - exact[2].detach()).abs().max()) for values in (found, expected)]
    assert worst[0] <= worst[1] + 1e-5


def test_sharded_weights_are_gathered() -> None:
    theirs, ours = both("divergence")
    heads = Heads()
    expected = divergence(theirs, heads, 0.5)
    wanted = heads.gradients(expected[0])
    with alone_in_group():
        mesh = init_device_mesh("cpu", (1,))
        for name in ("weight", "teacher_weight", "bias", "teacher_bias"):
            whole = getattr(heads, name)
            sharded = distribute_tensor(whole.detach(), mesh, [Shard(0)])
            setattr(heads, name, sharded.requires_grad_(whole.requires_grad))
        found = divergence(ours, heads, 0.5)
        gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in heads.gradients(found[0])]
    torch.testing.assert_close(found, expected, **FLOAT32)
    torch.testing.assert_close(gradients, wanted, **FLOAT32)


def test_a_second_use_changes_nothing() -> None:
    before = functions()
    with integration.use():
        inside = functions()
        with integration.use():
            assert functions() == inside
        assert functions() == inside
    assert functions() == before
    undo = integration.use()
    assert functions() != before
    undo.close()
    assert functions() == before


def test_every_binding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that imported the function by name, under whatever name, before."""
    theirs = functions()[1]
    user = type(sys)("trl.trainer.of_tomorrow")
    user.__dict__["Fused"] = theirs
    monkeypatch.setitem(sys.modules, user.__name__, user)
    with integration.use():
        assert user.__dict__["Fused"] is functions()[1] is not theirs
    assert user.__dict__["Fused"] is theirs


def other_arguments(hidden: Tensor, weight: Tensor) -> None: ...


@pytest.mark.parametrize(
    ("module", "name", "value", "said"),
    [
        (distillation_trainer, "_chunked_divergence_loss", None, "has no _chunked_divergence_loss"),
        (utils, "_ChunkedLogProbFunction", None, "has no _ChunkedLogProbFunction"),
        (distillation_trainer, "_chunked_divergence_loss", other_arguments, "takes other arguments"),
        (utils, "add_fused_lm_head", other_arguments, "nothing in trl.trainer.utils calls"),
    ],
)
def test_a_trl_that_does_not_fit_is_refused_by_version(
    module: Any, name: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(trl, "__version__", "9.8.7")
    before = dict(vars(distillation_trainer)), dict(vars(utils))
    with pytest.raises(RuntimeError, match=rf"does not fit TRL 9\.8\.7: .*{said}"):
        integration.use()
    assert before == (dict(vars(distillation_trainer)), dict(vars(utils)))


def test_another_field_of_the_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields that TRL can ask for are the default of `outputs`."""
    theirs = utils._ChunkedLogProbFunction

    def forward(*arguments: Any) -> None: ...

    signature = inspect.signature(theirs.forward)
    *others, outputs = signature.parameters.values()
    more = outputs.replace(default=(*outputs.default, "rank"))
    forward.__signature__ = signature.replace(parameters=[*others, more])  # type: ignore[attr-defined]
    monkeypatch.setattr(theirs, "forward", staticmethod(forward))
    with pytest.raises(RuntimeError, match=r"_ChunkedLogProbFunction\.apply takes other arguments"):
        integration.use()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["use-first", "import-first"])
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    lines = ["from trl import SFTTrainer", "from fastkl.integrations.trl import use; use()"]
    lines = lines[::-1] if order == "use-first" else lines
    check = "import trl.trainer.utils as u; print(u._ChunkedLogProbFunction.ours.__module__)"
    done = run_python("\n".join([*lines, check]))
    assert "fastkl.integrations.trl" in done.stdout, done.stderr
