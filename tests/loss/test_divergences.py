"""The divergences of `fastkl.loss`: values and gradients against the reference, the forms of a teacher, by-products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import NEEDS, Problem, make_problem
from torch import Tensor

from fastkl import loss, reference
from fastkl._loss.teacher import Teacher

# name -> options of the function, of which the reference takes the same
DIVERGENCES: dict[str, dict[str, float]] = {
    "reverse_kl": {},
    "forward_kl": {},
    "jsd": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.2},
    "skewed_reverse_kl": {"alpha": 0.2},
    "total_variation": {},
}
names = pytest.mark.parametrize("name", DIVERGENCES)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "temperature": 0.7,
        "teacher_temperature": 1.3,
        "logit_scale": 1.6,
        "teacher_logit_scale": 0.8,
        "softcap": 2.5,
        "teacher_softcap": 4.0,
        "chunk_size": 4,
    },
}


def call(name: str, p: Problem, **options: Any) -> loss.LossOutput:
    teacher = (
        {} if "teacher_logits" in options else {"teacher_hidden": p.teacher_hidden, "teacher_weight": p.teacher_weight}
    )
    biases = {"bias": p.bias} if teacher == {} else {"bias": p.bias, "teacher_bias": p.teacher_bias}
    options = {**teacher, **biases, "mask": p.mask, "tokens": p.tokens, **DIVERGENCES[name], **options}
    return getattr(loss, f"{name}_loss")(p.hidden, p.weight, **options)


def logits(p: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    """z of student and teacher, with options as `call` takes them."""
    heads = []
    for prefix, hidden, weight, bias in (
        ("", p.hidden, p.weight, p.bias),
        ("teacher_", p.teacher_hidden, p.teacher_weight, p.teacher_bias),
    ):
        head = {
            key: options[prefix + key] for key in ("temperature", "logit_scale", "softcap") if prefix + key in options
        }
        heads.append(reference.logits(hidden, weight, bias, **head))
    return heads[0], heads[1]


def plain(name: str, p: Problem, reduction: str = "mean", **options: Any) -> Tensor:
    counted = (p.tokens != -100).to(p.advantages.dtype)
    per_token = getattr(reference, name)(*logits(p, **options), **DIVERGENCES[name])
    return reference.reduce(per_token, counted if p.mask is None else p.mask * counted, reduction)


@names
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_equals_the_reference(name: str, head: dict[str, Any], needs: tuple[str, ...], reduction: str) -> None:
    p = make_problem((2, 6))
    found = []
    for function in (lambda *a, **o: call(*a, **o).loss, plain):
        q = p.leaves(needs)
        value = function(name, q, reduction=reduction, **head)
        upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=torch.float64).reshape(value.shape)
        found.append((value, *torch.autograd.grad(value, [getattr(q, f) for f in needs], upstream)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


@names
def test_teacher_as_logits(name: str) -> None:
    """A tensor, in float64 or rounded to bf16, and a function that is asked for the rows of a chunk at a time."""
    p = make_problem((2, 6))
    z = reference.logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    options: dict[str, Any] = {"temperature": 0.7, "teacher_softcap": 3.0, "chunk_size": 3}
    asked: list[list[int]] = []

    def chunks(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return z.reshape(-1, z.shape[-1])[rows]

    def run(q: Problem, **teacher: Any) -> tuple[Tensor, Tensor]:
        value = call(name, q, **options, **teacher).loss
        return value, torch.autograd.grad(value, q.hidden)[0]

    expected = run(p.leaves())
    torch.testing.assert_close(run(p.leaves(), teacher_logits=z), expected)
    torch.testing.assert_close(run(p.leaves(), teacher_logits=chunks), expected)
    active = ((p.tokens != -100) & (p.mask != 0)).flatten().nonzero().squeeze(1).tolist()
    assert [row for rows in asked for row in rows] == active
    assert all(len(rows) <= 3 for rows in asked)
    short = Problem(*[t.float() if t is not None and t.is_floating_point() else t for t in p])
    rounded = z.bfloat16()
    low = call(name, short, teacher_logits=rounded, **options).loss
    torch.testing.assert_close(low, call(name, short, teacher_logits=rounded.float(), **options).loss)


def test_a_function_as_teacher_is_asked_again_where_logits_are_made_again() -> None:
    """reduction="none" and a trainable head: the backward pass recomputes."""
    p = make_problem((5,))
    z = reference.logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    found = []
    for teacher in (z, lambda rows: z[rows]):
        q = p.leaves()
        call("jsd", q, teacher_logits=teacher, reduction="none").loss.sum().backward()
        found.append((q.hidden.grad, q.weight.grad, q.bias.grad))
    torch.testing.assert_close(found[0], found[1])


@names
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_vocab_size(name: str, needs: tuple[str, ...]) -> None:
    """Heads of 11 and of 13 rows with 9 ids in common: as though the rest had never been there, gradient 0 included."""
    p, wide = make_problem((2, 3)), make_problem((2, 3), vocabulary=13, seed=1)
    p = p._replace(teacher_weight=wide.teacher_weight, teacher_bias=wide.teacher_bias, tokens=p.tokens.clamp(max=8))
    cut = p._replace(**{f: getattr(p, f)[:9] for f in ("weight", "bias", "teacher_weight", "teacher_bias")})
    q, cut = p.leaves(needs), cut.leaves(needs)
    value, expected = call(name, q, vocab_size=9), call(name, cut)
    torch.testing.assert_close(value.loss, expected.loss)
    torch.testing.assert_close(value.logprobs, expected.logprobs)
    value.loss.backward()
    expected.loss.backward()
    for field in needs:
        gradient = getattr(q, field).grad
        if field != "hidden":
            assert (gradient[9:] == 0).all()
            gradient = gradient[:9]
        torch.testing.assert_close(gradient, getattr(cut, field).grad)
    z = reference.logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    torch.testing.assert_close(call(name, p, vocab_size=9, teacher_logits=z).loss, expected.loss)
    if "weight" in needs:
        buffer = torch.ones_like(p.weight)
        call(name, p.leaves(needs), vocab_size=9, weight_grad=buffer).loss.backward()
        torch.testing.assert_close(buffer, 1.0 + q.weight.grad)


@names
def test_squared_temperature(name: str) -> None:
    p = make_problem((4,)).leaves()
    one, two = (call(name, p, temperature=2.0, squared_temperature=flag) for flag in (False, True))
    torch.testing.assert_close(4.0 * one.loss, two.loss)
    torch.testing.assert_close(one.metrics, two.metrics)
    gradients = [torch.autograd.grad(output.loss, p.weight)[0] for output in (one, two)]
    torch.testing.assert_close(4.0 * gradients[0], gradients[1])


@names
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "no-tokens"])
def test_per_token(name: str, tokens: bool) -> None:
    """The by-products of the pass against their definitions; asking for them changes nothing else."""
    p = make_problem((2, 6))
    p = p if tokens else p._replace(tokens=torch.zeros_like(p.tokens))
    options: dict[str, Any] = {**HEADS["all"]} if tokens else {**HEADS["all"], "tokens": None}
    output, without = call(name, p, per_token=True, **options), call(name, p, **options)
    assert without.per_token is None
    assert torch.equal(output.loss, without.loss)
    found = output.per_token
    assert found is not None
    z, z_teacher = logits(p, **HEADS["all"])
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
        got = getattr(found, field)
        assert not got.requires_grad
        torch.testing.assert_close(got, value.where(counted, 0.0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("beta", "end"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_ends_of_the_jsd_are_the_kls(beta: float, end: str, normalized: bool) -> None:
    """By definition, value and gradient; normalised, they are what the values beside them tend to."""
    p = make_problem((4,))
    found = []
    near = abs(beta - 1e-5)
    for name, options in (
        ("jsd", {"beta": beta, "normalized": normalized}),
        (end, {}),
        ("jsd", {"beta": near, "normalized": True}),
    ):
        q = p.leaves()
        value = call(name, q, **options).loss
        value.backward()
        found.append((value.detach(), q.hidden.grad, q.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["skewed_forward_kl", "skewed_reverse_kl"])
def test_a_skew_of_nothing_is_the_kl(name: str) -> None:
    p = make_problem((4,))
    plain_name = name.removeprefix("skewed_")
    assert torch.equal(call(name, p, alpha=0.0).loss, call(plain_name, p).loss)


def test_metrics_are_those_of_the_divergence() -> None:
    p = make_problem((6,))
    output = call("jsd", p)
    values = call("jsd", p._replace(mask=None), reduction="none").loss
    counted = values[(p.mask != 0) & (p.tokens != -100)]
    torch.testing.assert_close(output.metrics["jsd_mean"], counted.mean())
    torch.testing.assert_close(output.metrics["jsd_max"], counted.max())


P = make_problem((2, 3), dtype=torch.float32)
Z = torch.zeros(2, 3, 11)
WRONG: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "beta": ("jsd", {"beta": 1.5}, ValueError, r"beta is 1.5; it must be in \[0, 1\]"),
    "alpha": ("skewed_forward_kl", {"alpha": 1.0}, ValueError, r"alpha is 1.0; it must be in \[0, 1\)"),
    "alpha-reverse": ("skewed_reverse_kl", {"alpha": -0.1}, ValueError, "alpha is -0.1"),
    "unknown": ("jsd", {"alpha": 0.5}, TypeError, "unexpected keyword argument 'alpha'"),
    "both": ("jsd", {"teacher_logits": Z, "teacher_hidden": P.teacher_hidden}, ValueError, "give teacher_hidden and"),
    "bias-of-logits": ("jsd", {"teacher_logits": Z, "teacher_bias": P.bias}, ValueError, "teacher_logits alone"),
    "half": ("jsd", {"teacher_weight": None}, ValueError, "the teacher is given as teacher_hidden, teacher_bias; give"),
    "nothing": (
        "jsd",
        {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None},
        ValueError,
        "the teacher is given as nothing",
    ),
    "list": ("jsd", {"teacher_logits": [[0.0]]}, TypeError, "teacher_logits must be a tensor .* or a function .*list"),
    "rows": (
        "jsd",
        {"teacher_logits": Z[0]},
        ValueError,
        r"teacher_logits is \[3, 11\] but student_hidden is \[2, 3, 5\]",
    ),
    "integers": ("jsd", {"teacher_logits": Z.long()}, TypeError, "teacher_logits is torch.int64"),
    "double": (
        "jsd",
        {"teacher_logits": Z.double()},
        TypeError,
        "teacher_logits is torch.float64 but student_hidden is",
    ),
    "gradient": ("jsd", {"teacher_logits": Z.clone().requires_grad_()}, ValueError, "the teacher requires a gradient"),
    "widths": ("jsd", {"teacher_logits": torch.zeros(2, 3, 12)}, ValueError, "a vocabulary of 12 .*vocab_size=len"),
    "vocab_size": (
        "jsd",
        {"vocab_size": 12},
        ValueError,
        r"vocab_size is 12; .*\(student_weight 11, teacher_weight 11\)",
    ),
    "vocab_size-0": ("jsd", {"vocab_size": 0}, ValueError, "vocab_size is 0"),
    "token": ("jsd", {"vocab_size": 3, "tokens": torch.full((2, 3), 5)}, ValueError, "tokens holds the id 5, outside"),
    "temperature": ("jsd", {"teacher_temperature": 0.0}, ValueError, "teacher_temperature is 0.0"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_refused(case: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    name, change, error, message = case
    with pytest.raises(error, match=message):
        call(name, P, **change)


def test_a_function_is_refused_in_a_graph() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"teacher_logits is a function, which torch\.compile does not take"):
        torch.compile(lambda: call("jsd", P, teacher_logits=lambda rows: Z), fullgraph=True, backend="aot_eager")()


@names
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    p = make_problem((5,)).leaves()
    compiled = torch.compile(lambda q: call(name, q, per_token=True), fullgraph=True, backend="aot_eager")
    outputs = [function(p) for function in (compiled, lambda q: call(name, q, per_token=True))]
    torch.testing.assert_close(outputs[0], outputs[1])
    gradients = [torch.autograd.grad(output.loss, [p.hidden, p.weight]) for output in outputs]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (Z.flatten(0, 1)[:1], ValueError, r"teacher_logits gave \[1, 11\] for 5 rows; expected \[5, 11\]"),
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
        call("reverse_kl", p, teacher_logits=lambda rows: found)


def test_a_function_runs_under_the_autocast_of_the_call() -> None:
    p = make_problem((5,), dtype=torch.float32)
    hidden = p.teacher_hidden.bfloat16()
    head = torch.nn.functional.linear
    with torch.autocast("cpu", torch.bfloat16):
        value = call("jsd", p, teacher_logits=lambda rows: head(hidden[rows], p.teacher_weight)).loss
        expected = call("jsd", p, teacher_logits=head(hidden, p.teacher_weight)).loss
    torch.testing.assert_close(value, expected)


def test_a_slice_of_logits_is_not_copied() -> None:
    """logits[:, :-1] is no view of [N, V]: its rows are taken a chunk at a time, masked ones left out."""
    p = make_problem((2, 6))
    z = torch.randn(2, 7, 11, dtype=torch.float64)
    teacher = Teacher(None, None, None, z[:, :-1])
    assert callable(teacher.flat(11, exactly=True)[3])
    assert not callable(Teacher(None, None, None, z).flat(11, exactly=True)[3])
    found = call("forward_kl", p, teacher_logits=z[:, :-1], chunk_size=2).loss
    torch.testing.assert_close(found, call("forward_kl", p, teacher_logits=z[:, :-1].contiguous()).loss)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_metrics_of_the_jsd_have_one_name(beta: float) -> None:
    assert set(call("jsd", make_problem((4,)), beta=beta).metrics) == {"jsd_mean", "jsd_max"}
