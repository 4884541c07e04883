"""The operators that torch sees: schema, fake tensors, ahead-of-time dispatch, and what travels through them."""

from __future__ import annotations

import pytest
import torch
from loss_cases import Problem, make_problem

from fastkl.kernels import operators
from fastkl.kernels.problem import HeadOptions, Inputs, Needs, RowLoss, Spec
from fastkl.kernels.surrogate import Surrogate
from fastkl.loss import Sparse

HEAD = HeadOptions(0.7, softcap=4.0)
NLL, JSD = Spec("token_nll", HEAD), Spec("divergence", HEAD, HeadOptions(), variant="jsd", parameter=0.3)
SPECS = {"token_nll": NLL, "jsd": JSD, "sparse": NLL._replace(sparse=Sparse(3, error=0.1))}


def inputs(p: Problem, teacher: bool) -> Inputs:
    theirs = (p.teacher_hidden, p.teacher_weight, p.teacher_bias) if teacher else ()
    return Inputs(p.hidden, p.weight, p.bias, p.tokens.clamp(min=0), *theirs)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("some", [False, True], ids=["all-rows", "some-rows"])
def test_opcheck(spec: Spec, some: bool) -> None:
    """Of both operators, by torch's own check."""
    p, teacher = make_problem((6,)), spec.teacher is not None
    active = torch.tensor([True, True, False, True, True, True]) if some else None
    graded = active & torch.tensor([True, False, True, True, True, True]) if active is not None else None
    tensors, packed = list(inputs(p, teacher)), operators._pack_spec(spec)
    torch.library.opcheck(torch.ops.fastkl.evaluate.default, (tensors, active, *packed))
    clips = operators._pack_surrogate(None if teacher else Surrogate("ppo", dual_clip=3.0))
    row_loss = [torch.rand(6).double(), *((None, None) if teacher else (p.advantages, p.sampler_logprobs))]
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        arguments = (tensors, active, graded, row_loss, *clips, 0.0, needs, *packed)
        torch.library.opcheck(torch.ops.fastkl.evaluate_with_gradients.default, arguments)


@pytest.mark.parametrize(
    "surrogate",
    [None, Surrogate(), Surrogate("ppo", 0.1, 0.3, dual_clip=2.0), Surrogate("reinforce", truncate_ratio=1.5)],
)
def test_a_surrogate_comes_out_as_it_went_in(surrogate: Surrogate | None) -> None:
    assert operators._unpack_surrogate(*operators._pack_surrogate(surrogate)) == surrogate


@pytest.mark.parametrize(
    "spec",
    [
        Spec("token_nll", HeadOptions(0.5, 2.0), None, "torch", 7),
        Spec("divergence", HeadOptions(softcap=3.0), HeadOptions(), variant="jsd", parameter=0.5, extras=True),
        NLL._replace(sparse=Sparse(3, error=0.1)),
        NLL._replace(sparse=Sparse(2**62, threshold=0.01)),
    ],
)
def test_a_spec_comes_out_as_it_went_in(spec: Spec) -> None:
    assert operators._unpack_spec(*operators._pack_spec(spec)) == spec


def test_gradients_without_a_surrogate() -> None:
    """Weights alone: the sum of weights · value, and the slope is the weight."""
    p, weights, needs = inputs(make_problem((6,)), False), torch.rand(6).double(), Needs(True, False, True)
    values, losses, gradients = operators.evaluate_with_gradients(NLL, p, RowLoss(weights), needs)
    torch.testing.assert_close(losses, weights * values[0])
    assert gradients.weight is None
    _, _, unit = operators.evaluate_with_gradients(NLL, p, RowLoss(), needs)
    torch.testing.assert_close(gradients.hidden, weights[:, None] * unit.hidden)
