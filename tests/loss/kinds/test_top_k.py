"""`top_k_kl_loss`: what each direction and tail promises, and lists as servers send them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import with_gradients
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import HEADS, eager, fused, fused_output, reference_logits, teacher_list
from problem import make_problem
from property_settings import PROPERTY

from fastkl import loss, reference
from fastkl._loss import top_k
from fastkl.kernels.options import DIRECTIONS, TAILS
from fastkl.loss import Sparse

FORMS = [(direction, tail) for direction in DIRECTIONS for tail in TAILS]
forms = pytest.mark.parametrize(("direction", "tail"), FORMS)
EXACT = {"reverse": "reverse_kl", "forward": "forward_kl"}


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(direction: str, tail: str, dtype: torch.dtype) -> None:
    """As accurate as plain PyTorch on float32 logits of the same operands."""
    p = make_problem((40,), vocabulary=101, dim=16, dtype=dtype)
    options = {"k": 10, "direction": direction, "tail": tail, "reduction": "none"}
    value = fused("top_k", p, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), eager("top_k", p.double(), **options), rtol=2e-5, atol=2e-5)


@forms
def test_the_whole_vocabulary_listed_is_the_exact_divergence(direction: str, tail: str) -> None:
    p = make_problem((5,))._replace(mask=None)
    value = fused("top_k", p, k=11, direction=direction, tail=tail, reduction="none", tokens=None)
    exact = getattr(reference, EXACT[direction])(*reference_logits(p))
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-12)


@PROPERTY
@given(seed=st.integers(0, 10**6), k=st.integers(1, 10), spread=st.sampled_from([0.5, 1.0, 3.0]))
def test_what_a_bucket_promises(seed: int, k: int, spread: float) -> None:
    """0 ≤ the divergence over k + 1 outcomes ≤ the one over V, in both directions, and more with every token listed."""
    p = make_problem((3,), seed=seed, spread=spread)._replace(mask=None, tokens=torch.zeros(3, dtype=torch.int64))
    for direction in DIRECTIONS:
        few, more = (fused("top_k", p, k=size, direction=direction, reduction="none") for size in (k, k + 1))
        assert (few >= -1e-12).all()
        assert (few <= more + 1e-9).all()
        assert (more <= eager(EXACT[direction], p, reduction="none") + 1e-9).all()


@PROPERTY
@given(seed=st.integers(0, 10**6), k=st.integers(1, 10), form=st.sampled_from(FORMS))
def test_gradient_rows_sum_to_zero(seed: int, k: int, form: tuple[str, str]) -> None:
    """A constant added to all logits changes nothing; the bias' gradient is the sum of the rows'."""
    options = {"k": k, "direction": form[0], "tail": form[1], "reduction": "sum"}
    gradients = with_gradients(fused, "top_k", make_problem((3,), seed=seed), ("bias",), **options).gradients
    assert abs(float(gradients["bias"].sum())) < 1e-10


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_student_mass_outside_the_list_is_not_free(direction: Any, tail: Any) -> None:
    """A student that agrees within the list is pushed back from what is outside it."""
    teacher = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    scores, head = torch.cat([teacher, torch.zeros(1, 3)], 1).requires_grad_(), torch.eye(6, dtype=torch.float64)
    options = {"direction": direction, "tail": tail}
    found = loss.top_k_kl_loss(scores, head, torch.tensor([[0, 1, 2]]), teacher, **options)
    found.loss.backward()
    assert found.loss > 0.5
    assert (scores.grad[0, 3:] > 0.05).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_student_like_its_teacher_has_no_divergence(direction: str) -> None:
    p = make_problem((4,))._replace(mask=None)
    same = p._replace(hidden=p.teacher_hidden, weight=p.teacher_weight, bias=p.teacher_bias)
    value, gradients = with_gradients(fused, "top_k", same, ("hidden",), k=5, direction=direction)
    assert abs(value.item()) < 1e-12
    assert float(gradients["hidden"].abs().max()) < 1e-12


@forms
def test_extreme_rows(direction: Any, tail: Any) -> None:
    """One-hot students, on the list and off it, in float32: finite, and as float64 has it."""
    ids = torch.tensor([[0, 1, 2]]).repeat(4, 1)
    logprobs = torch.tensor([[0.7, 0.2, 0.05]]).log().repeat(4, 1)
    z = torch.zeros(4, 9)
    z[0, 0], z[1, 8], z[2], z[3, :3] = 200.0, 60.0, -500.0, 40.0
    exact = reference.top_k_kl(z.double(), ids, logprobs.double(), direction, tail)
    options = {"direction": direction, "tail": tail, "reduction": "none"}
    hidden = z.clone().requires_grad_()
    value = loss.top_k_kl_loss(hidden, torch.eye(9), ids, logprobs, **options).loss
    finite = exact.isfinite()
    assert value[finite].isfinite().all()
    torch.testing.assert_close(value[finite].double(), exact[finite], rtol=1e-5, atol=1e-4)
    value.where(finite, 0.0).sum().backward()
    assert hidden.grad[finite].isfinite().all()


def test_vocab_size() -> None:
    """Padding rows of the student's head take no part, and have a gradient of 0."""
    p = make_problem((4,))
    ids, logprobs = teacher_list(p, 3)
    given = {"teacher_ids": ids % 8, "teacher_logprobs": logprobs}
    p = p._replace(tokens=p.tokens.clamp(max=8))
    cut = with_gradients(fused, "top_k", p._replace(weight=p.weight[:9], bias=p.bias[:9]), **given)
    whole = with_gradients(fused, "top_k", p, vocab_size=9, **given)
    torch.testing.assert_close(whole.value, cut.value)
    torch.testing.assert_close(whole.gradients["weight"][:9], cut.gradients["weight"])
    assert (whole.gradients["weight"][9:] == 0).all()


def test_squared_temperature() -> None:
    p = make_problem((4,))
    one, four = (fused("top_k", p, temperature=2.0, squared_temperature=flag) for flag in (False, True))
    torch.testing.assert_close(4.0 * one, four)


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all-chunked"]], ids=["plain", "all"])
def test_logprobs_and_metrics(head: dict[str, Any]) -> None:
    """Those of the tokens, 0 where masked; also for a token on the list, one off it, and under a soft-cap."""
    p = make_problem((2, 6))
    output, counted = fused_output("top_k", p, k=3, **head), (p.mask != 0) & (p.tokens != -100)
    torch.testing.assert_close(output.logprobs, eager("linear_logprobs", p, **head).where(counted, 0.0))
    exact = eager("top_k", p._replace(mask=None), k=3, reduction="none", **head)[counted]
    torch.testing.assert_close(output.metrics, {"top_k_kl_mean": exact.mean(), "top_k_kl_max": exact.max()})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_left_outside_the_list(direction: str) -> None:
    """Every unlisted token forbidden: no tail, and no 0 / 0."""
    p = make_problem((3,))._replace(mask=None, tokens=torch.tensor([0, 1, 2]))
    p = p._replace(bias=p.bias.where(torch.arange(11) < 3, -torch.inf))
    ids, logprobs = torch.tensor([[0, 1, 2]]).repeat(3, 1), torch.log_softmax(p.teacher_hidden[:, :3], -1)
    given = {"teacher_ids": ids, "teacher_logprobs": logprobs, "direction": direction}
    assert with_gradients(fused, "top_k", p, ("hidden",), **given).gradients["hidden"].isfinite().all()


@pytest.mark.parametrize("skip", [True, False])
def test_a_masked_row_needs_no_list(skip: bool) -> None:
    p = make_problem((4,))._replace(tokens=torch.zeros(4, dtype=torch.int64))
    p = p._replace(mask=torch.tensor([1.0, 0.0, 1.0, 1.0]).double())
    ids, logprobs = teacher_list(p)
    ids[1] = -1
    found = fused("top_k", p, teacher_ids=ids, teacher_logprobs=logprobs, skip_zero_rows=skip)
    torch.testing.assert_close(found, fused("top_k", p))


@pytest.mark.parametrize("backward", ["exact", Sparse(0)], ids=["exact", "sparse"])
@forms
def test_on_an_accelerator_a_wrong_id_makes_its_row_nan(
    monkeypatch: pytest.MonkeyPatch, direction: str, tail: str, backward: Any
) -> None:
    """Where nobody looks at the list; a row that is left out may hold what it likes."""
    monkeypatch.setattr(top_k, "_look_at_list", lambda *_: None)
    p = make_problem((4,))._replace(mask=torch.tensor([1.0, 1.0, 0.0, 1.0]), tokens=torch.zeros(4, dtype=torch.int64))
    ids, logprobs = teacher_list(p)
    p, options = p.leaves(), {"direction": direction, "tail": tail, "reduction": "none", "backward": backward}
    lists = {"clean": ids.clone(), "dirty": ids}
    ids[1, 2], ids[2, 0], ids[3] = 11, 2**40, -1
    found = {
        name: loss.top_k_kl_loss(p.hidden, p.weight, chosen, logprobs, bias=p.bias, mask=p.mask, **options).loss
        for name, chosen in lists.items()
    }
    assert found["dirty"].isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(found["dirty"][[0, 2]], found["clean"][[0, 2]])
    (gradient,) = torch.autograd.grad(found["dirty"].sum(), p.hidden)
    assert gradient.isnan().all(1).tolist() == [False, True, False, True]
    assert not gradient[[0, 2]].isnan().any()
