"""The losses under torch.compile: one graph, the same numbers, no new graph for another number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import LOSSES, NEEDS, Problem, fused, make_problem
from torch import Tensor

from fastkl.kernels import operators as ops
from fastkl.kernels.problem import HeadOptions, Inputs, Needs, RowLoss, Spec
from fastkl.kernels.surrogate import Surrogate
from fastkl.loss import policy_gradient_loss

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOSSES},
    "policy_gradient-none": ("policy_gradient", {"reduction": "none"}),
    "policy_gradient-ppo": ("policy_gradient", {"method": "ppo", "dual_clip": 3.0}),
    "policy_gradient-all-rows": ("policy_gradient", {"skip_zero_rows": False}),
    "reverse_kl-none": ("reverse_kl", {"reduction": "none"}),
    "linear_logprobs-capped": ("linear_logprobs", {"softcap": 5.0, "temperature": 0.7}),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def step(name: str, p: Problem, **options: Any) -> Tensor:
    """A model of one layer under the loss, as a training step has it."""
    return fused(name, p._replace(hidden=torch.tanh(p.hidden)), **options).sum()


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_graph(form: tuple[str, dict[str, Any]], needs: tuple[str, ...]) -> None:
    name, options = form
    p = make_problem((2, 5)).leaves(needs)
    tensors = [getattr(p, field) for field in needs]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    values, gradients = [], []
    for function in (step, compiled):
        values.append(function(name, p, **options))
        gradients.append(torch.autograd.grad(values[-1], tensors))
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_another_number_of_tokens_is_the_same_graph() -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled("policy_gradient", make_problem((4,)).leaves()).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (7, 12):
            p = make_problem((n,)).leaves()
            torch.testing.assert_close(compiled("policy_gradient", p), step("policy_gradient", p))


@pytest.mark.slow
def test_inductor() -> None:
    """The default compiler, a training step with its optimizer around it."""
    p = make_problem((20,), dtype=torch.float32)
    found = []
    for compiler in (lambda f: f, lambda f: torch.compile(f, fullgraph=True)):
        torch.manual_seed(0)
        body, head = torch.nn.Linear(5, 5), torch.nn.Parameter(p.weight.clone())
        optimizer = torch.optim.SGD([*body.parameters(), head], lr=0.1)

        def loss(x: Tensor, body: torch.nn.Module = body, head: Tensor = head) -> Tensor:
            return policy_gradient_loss(body(x), head, p.tokens, p.advantages, p.sampler_logprobs, mask=p.mask).loss

        train = compiler(loss)
        for _ in range(3):
            train(p.hidden).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((body.weight.detach(), head.detach()))
    torch.testing.assert_close(found[1], found[0])


def test_weight_grad_is_refused_in_a_graph() -> None:
    p = make_problem((4,)).leaves()

    def with_buffer() -> Tensor:
        return fused("policy_gradient", p, weight_grad=torch.zeros_like(p.weight))

    with pytest.raises(Exception, match=r"which torch\.compile does not take"):
        torch.compile(with_buffer, fullgraph=True, backend="aot_eager")()


def inputs(p: Problem, teacher: bool) -> Inputs:
    theirs = (p.teacher_hidden, p.teacher_weight, p.teacher_bias) if teacher else ()
    return Inputs(p.hidden, p.weight, p.bias, p.tokens.clamp(min=0), *theirs)


@pytest.mark.parametrize("teacher", [False, True], ids=["token_nll", "jsd"])
@pytest.mark.parametrize("some", [False, True], ids=["all-rows", "some-rows"])
def test_opcheck(teacher: bool, some: bool) -> None:
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch of both operators, by torch's own check."""
    p = make_problem((6,))
    head = HeadOptions(0.7, softcap=4.0)
    spec = Spec("divergence", head, HeadOptions(), variant="jsd", parameter=0.3) if teacher else Spec("token_nll", head)
    active = torch.tensor([True, True, False, True, True, True]) if some else None
    graded = active & torch.tensor([True, False, True, True, True, True]) if some and active is not None else None
    tensors = list(inputs(p, teacher))
    packed = ops._pack_spec(spec)
    torch.library.opcheck(torch.ops.fastkl.evaluate.default, (tensors, active, *packed))
    clips = ops._pack_surrogate(None if teacher else Surrogate("ppo", dual_clip=3.0))
    objective = [torch.rand(6).double(), *((None, None) if teacher else (p.advantages, p.sampler_logprobs))]
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        arguments = (tensors, active, graded, objective, *clips, 0.0, needs, *packed)
        torch.library.opcheck(torch.ops.fastkl.evaluate_with_gradients.default, arguments)


@pytest.mark.parametrize(
    "surrogate",
    [None, Surrogate(), Surrogate("ppo", 0.1, 0.3, dual_clip=2.0), Surrogate("reinforce", truncate_ratio=1.5)],
)
def test_what_is_packed_comes_out_again(surrogate: Surrogate | None) -> None:
    assert ops._unpack_surrogate(*ops._pack_surrogate(surrogate)) == surrogate
    for spec in (
        Spec("token_nll", HeadOptions(0.5, 2.0), None, "torch", 7),
        Spec("divergence", HeadOptions(softcap=3.0), HeadOptions(), variant="jsd", parameter=0.5, extras=True),
    ):
        assert ops._unpack_spec(*ops._pack_spec(spec)) == spec


def test_gradients_of_an_objective_without_a_surrogate() -> None:
    """Weights alone: the sum of weights · value, and the slope is the weight."""
    p, weights = make_problem((6,)), torch.rand(6).double()
    spec = Spec("token_nll", HeadOptions())
    needs = Needs(True, False, True)
    values, losses, gradients = ops.evaluate_with_gradients(spec, inputs(p, False), RowLoss(weights), needs)
    torch.testing.assert_close(losses, weights * values[0])
    assert gradients.weight is None
    _, _, unit = ops.evaluate_with_gradients(spec, inputs(p, False), RowLoss(), needs)
    assert gradients.hidden is not None
    assert unit.hidden is not None
    torch.testing.assert_close(gradients.hidden, weights[:, None] * unit.hidden)
