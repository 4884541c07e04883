"""The operators that torch sees: schema, fake tensors, ahead-of-time dispatch, and what travels through them."""

from __future__ import annotations

import pytest
import torch
from problem import Problem as Case
from problem import make_problem

from fastkl.kernels.operators import library
from fastkl.kernels.operators.records import pack, unpack
from fastkl.kernels.options import Surrogate
from fastkl.kernels.problem import HeadOptions, Inputs, Needs, Problem, RowLoss, Rows, Spec
from fastkl.loss import Sparse

HEAD = HeadOptions(0.7, softcap=4.0)
NLL, JSD = Spec("token_nll", HEAD), Spec("divergence", HEAD, HeadOptions(), variant="jsd", parameter=0.3)
SPECS = {"token_nll": NLL, "jsd": JSD, "sparse": NLL._replace(sparse=Sparse(3, error=0.1))}


def inputs(p: Case, teacher: bool) -> Inputs:
    theirs = (p.teacher_hidden, p.teacher_weight, p.teacher_bias) if teacher else ()
    return Inputs(p.hidden, p.weight, p.bias, p.tokens.clamp(min=0), *theirs)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("some", [False, True], ids=["all-rows", "some-rows"])
def test_opcheck(spec: Spec, some: bool) -> None:
    """Of both operators, by torch's own check."""
    p, teacher = make_problem((6,)), spec.teacher is not None
    active = torch.tensor([True, True, False, True, True, True]) if some else None
    graded = active & torch.tensor([True, False, True, True, True, True]) if active is not None else None
    surrogate = None if teacher else Surrogate("ppo", dual_clip=3.0)
    terms = (None, None) if teacher else (p.advantages, p.sampler_logprobs)
    row_loss = RowLoss(torch.rand(6).double(), *terms, surrogate)
    problem = Problem(inputs(p, teacher), spec, row_loss, Rows(active, graded))
    torch.library.opcheck(torch.ops.fastkl.evaluate.default, pack(problem))
    for needs in (Needs(True, True, True), Needs(True, False, False), Needs(False, True, False)):
        torch.library.opcheck(torch.ops.fastkl.evaluate_with_gradients.default, pack(problem, needs))


@pytest.mark.parametrize(
    "surrogate",
    [None, Surrogate(), Surrogate("ppo", 0.1, 0.3, dual_clip=2.0), Surrogate("reinforce", truncate_ratio=1.5)],
)
def test_a_surrogate_comes_out_as_it_went_in(surrogate: Surrogate | None) -> None:
    row_loss = RowLoss(surrogate=surrogate, entropy_coef=0.5)
    assert unpack((RowLoss,), *pack(row_loss)) == [row_loss]


def test_slopes_are_the_gradient() -> None:
    """Of −log p[y], the entropy and the lse, of whole rows and of some."""
    p, slopes = inputs(make_problem((6,)), False), torch.randn(3, 6, dtype=torch.float64)
    spec, needs, rows = Spec("token_nll_entropy", HeadOptions()), Needs(True, True, True), torch.arange(6) % 3 != 1
    x = [t.detach().requires_grad_() for t in (p.hidden, p.weight, p.bias)]
    z = torch.nn.functional.linear(*x)
    log_p = torch.log_softmax(z, -1)
    nll, entropy = -log_p.gather(1, p.tokens[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    for some in (None, rows):
        wanted = (slopes * torch.stack([nll, entropy, torch.logsumexp(z, -1)])).sum(0)
        wanted = wanted if some is None else wanted.where(some, 0.0)
        problem = Problem(p, spec, RowLoss(slopes=slopes), Rows(some))
        _, losses, gradients = library.evaluate_with_gradients(problem, needs)
        torch.testing.assert_close(losses, wanted)
        torch.testing.assert_close(gradients[:3], torch.autograd.grad(wanted.sum(), x, retain_graph=True))


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
    needs = Needs(True, False, True)
    assert unpack((Spec, Needs), *pack(spec, needs)) == [spec, needs]


def test_gradients_without_a_surrogate() -> None:
    """Weights alone: the sum of weights · value, and the slope is the weight."""
    p, weights, needs = inputs(make_problem((6,)), False), torch.rand(6).double(), Needs(True, False, True)
    values, losses, gradients = library.evaluate_with_gradients(Problem(p, NLL, RowLoss(weights)), needs)
    torch.testing.assert_close(losses, weights * values[0])
    assert gradients.weight is None
    _, _, unit = library.evaluate_with_gradients(Problem(p, NLL), needs)
    torch.testing.assert_close(gradients.hidden, weights[:, None] * unit.hidden)
