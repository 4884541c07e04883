"""The losses under torch.compile: one graph, the same numbers, no new graph for another number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import FORMS, Forms, each_plan, fused, fused_output
from problem import Problem, make_problem
from torch import Tensor

from fastkl.loss import policy_gradient_loss

MORE_FORMS: Forms = {
    **FORMS,
    "policy_gradient-ppo": ("policy_gradient", {"method": "ppo", "dual_clip": 3.0}),
    "reference-kl-and-bounds": ("reference_kl", {"ratio": "sequence", "ratio_bounds": (0.5, 1.5)}),
    "policy_gradient-all-rows": ("policy_gradient", {"skip_zero_rows": False}),
    "linear_logprobs-capped": ("linear_logprobs", {"softcap": 5.0, "temperature": 0.7}),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def step(name: str, p: Problem, **options: Any) -> Tensor:
    """A model of one layer under the loss, as a training step has it."""
    return fused(name, p._replace(hidden=torch.tanh(p.hidden)), **options).sum()


@each_plan(MORE_FORMS)
def test_one_graph(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    p = make_problem((2, 5)).leaves(needs)
    tensors = [getattr(p, field) for field in needs]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    values, gradients = [], []
    for function in (step, compiled):
        values.append(function(name, p, **options))
        gradients.append(torch.autograd.grad(values[-1], tensors))
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_by_products_in_one_graph() -> None:
    p = make_problem((5,)).leaves()
    found = []
    for compiler in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        output = compiler(lambda q: fused_output("jsd", q, per_token=True))(p)
        found.append((output, torch.autograd.grad(output.loss, [p.hidden, p.weight])))
    torch.testing.assert_close(found[1], found[0])


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
