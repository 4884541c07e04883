"""The divergences of `fastkl.loss`: the forms of a teacher, heads of two sizes, temperatures, by-products, ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import with_gradients
from loss_cases import DIVERGENCES, each_need, eager, fused, fused_output, reference_logits
from problem import Problem, make_problem
from torch import Tensor

from fastkl import reference
from fastkl._loss.teacher import Teacher
from fastkl.kernels.problem import Inputs

names = pytest.mark.parametrize("name", DIVERGENCES)
EVERYTHING: dict[str, Any] = {
    "temperature": 0.7,
    "teacher_temperature": 1.3,
    "logit_scale": 1.6,
    "teacher_logit_scale": 0.8,
    "softcap": 2.5,
    "teacher_softcap": 4.0,
    "chunk_size": 4,
}


def teacher_logits(p: Problem) -> Tensor:
    return reference.logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias)


@names
def test_teacher_as_logits(name: str) -> None:
    """A tensor, in float64 or rounded to bf16, and a function that is asked for the rows of a chunk at a time."""
    p = make_problem((2, 6))
    z = teacher_logits(p)
    options: dict[str, Any] = {"temperature": 0.7, "teacher_softcap": 3.0, "chunk_size": 3}
    asked: list[list[int]] = []

    def chunks(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return z.flatten(0, 1)[rows]

    expected = with_gradients(fused, name, p, ("hidden",), **options)
    for teacher in (z, chunks):
        ours = with_gradients(fused, name, p, ("hidden",), teacher_logits=teacher, **options)
        torch.testing.assert_close(tuple(ours), tuple(expected))
    active = ((p.tokens != -100) & (p.mask != 0)).flatten().nonzero().squeeze(1).tolist()
    assert [row for rows in asked for row in rows] == active
    assert all(len(rows) <= 3 for rows in asked)
    short, rounded = p.to_dtype(torch.float32), z.bfloat16()
    low, high = (fused(name, short, teacher_logits=t, **options) for t in (rounded, rounded.float()))
    torch.testing.assert_close(low, high)


def test_a_function_as_teacher_is_asked_again_where_logits_are_made_again() -> None:
    """reduction="none" and a trainable head: the backward pass recomputes."""
    p = make_problem((5,))
    z = teacher_logits(p)
    found = [with_gradients(fused, "jsd", p, teacher_logits=t, reduction="none") for t in (z, lambda rows: z[rows])]
    torch.testing.assert_close(found[0].gradients, found[1].gradients)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (torch.zeros(1, 11), ValueError, r"teacher_logits gave \[1, 11\] for 5 rows; expected \[5, 11\]"),
        (torch.zeros(5, 1), ValueError, r"gave \[5, 1\]"),
        (torch.zeros(5, 12), ValueError, r"gave \[5, 12\]"),
        (torch.zeros(5, 11).long(), TypeError, "gave torch.int64 for 5 rows"),
        (None, TypeError, "gave NoneType"),
    ],
    ids=["broadcasts", "one-column", "wide", "integers", "nothing"],
)
def test_what_a_function_gives_is_checked(found: Any, error: type[Exception], message: str) -> None:
    p = make_problem((5,), dtype=torch.float32)._replace(mask=None, tokens=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(error, match=message):
        fused("reverse_kl", p, teacher_logits=lambda rows: found)


def test_a_function_is_refused_in_a_graph() -> None:
    torch._dynamo.reset()
    p = make_problem((2, 3))
    with pytest.raises(Exception, match=r"teacher_logits is a function, which torch\.compile does not take"):
        torch.compile(lambda: fused("jsd", p, teacher_logits=lambda rows: None), fullgraph=True, backend="aot_eager")()


def test_a_function_runs_under_the_autocast_of_the_call() -> None:
    p = make_problem((5,), dtype=torch.float32)
    hidden = p.teacher_hidden.bfloat16()
    head = torch.nn.functional.linear
    with torch.autocast("cpu", torch.bfloat16):
        value = fused("jsd", p, teacher_logits=lambda rows: head(hidden[rows], p.teacher_weight))
        expected = fused("jsd", p, teacher_logits=head(hidden, p.teacher_weight))
    torch.testing.assert_close(value, expected)


def test_a_slice_of_logits_is_not_copied() -> None:
    """logits[:, :-1] is no view of [N, V]: its rows are taken a chunk at a time, masked ones left out."""
    p = make_problem((2, 6))
    z = torch.randn(2, 7, 11, dtype=torch.float64)
    inputs, teacher = Inputs(p.hidden, p.weight), Teacher(None, None, None, z)
    assert not callable(teacher.join(inputs, None, None).teacher_logits)
    assert callable(teacher._replace(logits=z[:, :-1]).join(inputs, None, None).teacher_logits)
    found, dense = (fused("forward_kl", p, teacher_logits=t, chunk_size=2) for t in (z[:, :-1], z[:, :-1].contiguous()))
    torch.testing.assert_close(found, dense)


@names
@each_need
def test_vocab_size(name: str, needs: tuple[str, ...]) -> None:
    """Heads of 11 and of 13 rows with 9 ids in common: as though the rest had never been there, gradient 0 included."""
    p, wide = make_problem((2, 3)), make_problem((2, 3), vocabulary=13, seed=1)
    p = p._replace(teacher_weight=wide.teacher_weight, teacher_bias=wide.teacher_bias, tokens=p.tokens.clamp(max=8))
    cut = p._replace(**{f: getattr(p, f)[:9] for f in ("weight", "bias", "teacher_weight", "teacher_bias")})
    ours, expected = with_gradients(fused, name, p, needs, vocab_size=9), with_gradients(fused, name, cut, needs)
    torch.testing.assert_close(ours.value, expected.value)
    for field, gradient in ours.gradients.items():
        shared = gradient if field == "hidden" else gradient[:9]
        torch.testing.assert_close(shared, expected.gradients[field])
        assert (gradient[len(shared) :] == 0).all()
    logprobs = [fused_output(name, q, **o).logprobs for q, o in ((p, {"vocab_size": 9}), (cut, {}))]
    torch.testing.assert_close(logprobs[0], logprobs[1])
    torch.testing.assert_close(fused(name, p, vocab_size=9, teacher_logits=teacher_logits(p)), expected.value)
    if "weight" in needs:
        buffer = torch.ones_like(p.weight)
        fused(name, p.leaves(needs), vocab_size=9, weight_grad=buffer).backward()
        torch.testing.assert_close(buffer, 1.0 + ours.gradients["weight"])


@names
def test_squared_temperature(name: str) -> None:
    p = make_problem((4,))
    one, two = (with_gradients(fused, name, p, temperature=2.0, squared_temperature=flag) for flag in (False, True))
    torch.testing.assert_close(4.0 * one.value, two.value)
    torch.testing.assert_close(4.0 * one.gradients["weight"], two.gradients["weight"])
    metrics = [fused_output(name, p, temperature=2.0, squared_temperature=flag).metrics for flag in (False, True)]
    torch.testing.assert_close(metrics[0], metrics[1])


@names
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "no-tokens"])
def test_per_token(name: str, tokens: bool) -> None:
    """The by-products of the pass against their definitions; asking for them changes nothing else."""
    p = make_problem((2, 6))
    p = p if tokens else p._replace(tokens=torch.zeros_like(p.tokens))
    options = EVERYTHING if tokens else {**EVERYTHING, "tokens": None}
    output, without = fused_output(name, p, per_token=True, **options), fused_output(name, p, **options)
    assert without.per_token is None
    assert torch.equal(output.loss, without.loss)
    found = output.per_token
    assert found is not None
    z, z_teacher = reference_logits(p, **EVERYTHING)
    counted = (p.mask != 0) & (p.tokens != -100)
    expected = {
        "student_entropy": reference.entropy(z),
        "teacher_entropy": reference.entropy(z_teacher),
        "reverse_kl": reference.reverse_kl(z, z_teacher),
        "forward_kl": reference.forward_kl(z, z_teacher),
        "top1_agreement": (z.argmax(-1) == z_teacher.argmax(-1)).double(),
    }
    if tokens:
        expected["student_logprobs"] = reference.logprobs(z, p.tokens)
        expected["teacher_logprobs"] = reference.logprobs(z_teacher, p.tokens)
        torch.testing.assert_close(found.student_logprobs, output.logprobs)
    else:
        assert (found.student_logprobs, found.teacher_logprobs, output.logprobs) == (None, None, None)
    for field, value in expected.items():
        assert not getattr(found, field).requires_grad
        torch.testing.assert_close(getattr(found, field), value.where(counted, 0.0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("beta", "end"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_ends_of_the_jsd_are_the_kls(beta: float, end: str, normalized: bool) -> None:
    """By definition, value and gradient; normalised, they are what the values beside them tend to."""
    p, near = make_problem((4,)), abs(beta - 1e-5)
    ours, exact = with_gradients(fused, "jsd", p, beta=beta, normalized=normalized), with_gradients(fused, end, p)
    beside = with_gradients(fused, "jsd", p, beta=near, normalized=True)
    torch.testing.assert_close(tuple(ours), tuple(exact), rtol=0, atol=0)
    torch.testing.assert_close(beside.value, exact.value, rtol=1e-3, atol=1e-4)
    for field in ("hidden", "weight"):
        torch.testing.assert_close(beside.gradients[field], exact.gradients[field], rtol=1e-3, atol=1e-4)


def test_powers_of_the_density_power_divergence() -> None:
    """0 is the reverse KL, bit by bit, and tiny ones tend to it; 1 is half the squared distance; large ones are small."""
    p = make_problem((4, 3), spread=5.0)
    plain = with_gradients(fused, "reverse_kl", p)
    for power in (0, 0.0, 1e-300):
        found = with_gradients(fused, "density_power", p, power=power)
        torch.testing.assert_close(tuple(found), tuple(plain), rtol=0, atol=0)
    for power in (1e-29, 1e-12):
        found = with_gradients(fused, "density_power", p, power=power)
        torch.testing.assert_close(tuple(found), tuple(plain), rtol=1e-9, atol=1e-12)
    student, teacher = (torch.softmax(z, -1) for z in reference_logits(p))
    half = fused("density_power", p._replace(mask=None), power=1.0, reduction="none")
    counted = p.tokens != -100
    torch.testing.assert_close(half, (0.5 * (student - teacher).square().sum(-1)).where(counted, 0.0))
    assert 0 < fused("density_power", p, power=1000.0) <= 1e-3


@names
def test_metrics_are_those_of_the_divergence(name: str) -> None:
    p = make_problem((4, 8))
    output, active = fused_output(name, p), (p.mask != 0) & (p.tokens != -100)
    values = eager(name, p._replace(mask=None), reduction="none")[active]
    torch.testing.assert_close(output.metrics, {f"{name}_mean": values.mean(), f"{name}_max": values.max()})
    torch.testing.assert_close(output.logprobs, eager("linear_logprobs", p).where(active, 0.0))
    assert fused_output(name, p, tokens=None).logprobs is None


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_metrics_of_the_jsd_have_one_name(beta: float) -> None:
    assert set(fused_output("jsd", make_problem((4,)), beta=beta).metrics) == {"jsd_mean", "jsd_max"}


def test_the_metrics_of_the_jsd_are_not_normalized() -> None:
    plain, normalized = (fused_output("jsd", make_problem((4,)), normalized=flag) for flag in (False, True))
    torch.testing.assert_close(normalized.loss, plain.loss / (0.3 * 0.7))
    assert normalized.metrics == plain.metrics
