"""Bad input: the type of the error, a message that names the argument and what it got, and nothing computed before it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from loss_cases import make_problem

from fastkl import loss

P = make_problem((2, 3), vocabulary=11, dim=5, dtype=torch.float32)
TOKENS = P.tokens.clamp(min=0)
LEAF = P.weight.clone().requires_grad_()

CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear_logprobs": (loss.linear_logprobs, {"hidden": P.hidden, "weight": P.weight, "tokens": TOKENS}),
    "policy_gradient": (
        loss.policy_gradient_loss,
        {
            "hidden": P.hidden,
            "weight": P.weight,
            "tokens": TOKENS,
            "advantages": P.advantages,
            "old_logprobs": P.sampler_logprobs,
        },
    ),
    "sampled_reverse_kl": (
        loss.sampled_reverse_kl_loss,
        {
            "hidden": P.hidden,
            "weight": P.weight,
            "tokens": TOKENS,
            "teacher_logprobs": P.teacher_logprobs,
            "sampler_logprobs": P.sampler_logprobs,
        },
    ),
    "reverse_kl": (
        loss.reverse_kl_loss,
        {
            "student_hidden": P.hidden,
            "student_weight": P.weight,
            "teacher_hidden": P.teacher_hidden,
            "teacher_weight": P.teacher_weight,
        },
    ),
}
HEAD_LOSSES = ("linear_logprobs", "policy_gradient", "sampled_reverse_kl")
REDUCED = ("policy_gradient", "sampled_reverse_kl", "reverse_kl")
POLICY = ("policy_gradient", "sampled_reverse_kl")

# (losses, changed arguments, error, parts of the message)
Case = tuple[tuple[str, ...], dict[str, Any], type[Exception], tuple[str, ...]]
META = "meta"  # a second device that every machine has
CASES: dict[str, Case] = {
    # The head.
    "weight-width": (HEAD_LOSSES, {"weight": torch.zeros(11, 4)}, ValueError, ("hidden [2, 3, 5]", "weight [11, 4]")),
    "weight-transposed": (HEAD_LOSSES, {"weight": P.weight.t()}, ValueError, ("weight [5, 11]", "[V, D]")),
    "weight-1d": (HEAD_LOSSES, {"weight": torch.zeros(5)}, ValueError, ("weight [5]", "[V, D]")),
    "weight-empty": (HEAD_LOSSES, {"weight": torch.zeros(0, 5)}, ValueError, ("weight [0, 5]", "empty vocabulary")),
    "weight-type": (HEAD_LOSSES, {"weight": [[0.0]]}, TypeError, ("weight", "list")),
    "weight-device": (
        HEAD_LOSSES,
        {"weight": P.weight.to(META)},
        ValueError,
        ("weight is on meta", "hidden is on cpu"),
    ),
    "weight-dtype": (
        HEAD_LOSSES,
        {"weight": P.weight.bfloat16()},
        TypeError,
        ("hidden is torch.float32", "weight is torch.bfloat16", "autocast"),
    ),
    "hidden-0d": (HEAD_LOSSES[:2], {"hidden": torch.tensor(1.0)}, ValueError, ("hidden []", "[..., D]")),
    "hidden-type": (HEAD_LOSSES[:2], {"hidden": None}, TypeError, ("hidden", "NoneType")),
    "hidden-int": (
        HEAD_LOSSES,
        {"hidden": torch.zeros(2, 3, 5).long()},
        TypeError,
        ("hidden is torch.int64", "float32"),
    ),
    "bias-shape": (HEAD_LOSSES, {"bias": torch.zeros(5)}, ValueError, ("bias [5]", "weight [11, 5]", "[V]")),
    "bias-scalar": (HEAD_LOSSES, {"bias": torch.tensor(0.0)}, ValueError, ("bias []", "[V]")),
    "bias-dtype": (
        HEAD_LOSSES,
        {"bias": torch.zeros(11).half()},
        TypeError,
        ("torch.float32", "bias is torch.float16"),
    ),
    "bias-type": (HEAD_LOSSES, {"bias": 0.5}, TypeError, ("bias", "float")),
    "temperature-zero": (tuple(CALLS), {"temperature": 0.0}, ValueError, ("temperature is 0.0", "> 0", "greedy")),
    "temperature-nan": (tuple(CALLS), {"temperature": torch.nan}, ValueError, ("temperature is nan",)),
    "logit_scale": (tuple(CALLS), {"logit_scale": -2.0}, ValueError, ("logit_scale is -2.0", "> 0")),
    "softcap": (tuple(CALLS), {"softcap": 0.0}, ValueError, ("softcap is 0.0", "None")),
    "chunk_size": (tuple(CALLS), {"chunk_size": 0}, ValueError, ("chunk_size is 0", "at least 1")),
    "chunk_size-float": (tuple(CALLS), {"chunk_size": 4.0}, ValueError, ("chunk_size is 4.0", "whole number")),
    "backend": (tuple(CALLS), {"backend": "cuda"}, ValueError, ("backend is 'cuda'", "auto, triton, torch")),
    "weight_grad-frozen": (
        tuple(CALLS),
        {"weight_grad": torch.zeros(11, 5)},
        ValueError,
        ("weight_grad is given", "does not require a gradient"),
    ),
    "weight_grad-shape": (
        HEAD_LOSSES,
        {"weight": LEAF, "weight_grad": torch.zeros(5, 11)},
        ValueError,
        ("weight_grad is [5, 11] of torch.float32", "expected [11, 5] of torch.float32"),
    ),
    "weight_grad-dtype": (
        HEAD_LOSSES,
        {"weight": LEAF, "weight_grad": torch.zeros(11, 5).bfloat16()},
        ValueError,
        ("weight_grad is [11, 5] of torch.bfloat16", "summed in"),
    ),
    # The tokens.
    "tokens-shape": (
        HEAD_LOSSES,
        {"tokens": TOKENS[0]},
        ValueError,
        ("tokens is [3]", "hidden is [2, 3, 5]", "[2, 3]"),
    ),
    "tokens-float": (HEAD_LOSSES, {"tokens": TOKENS.float()}, TypeError, ("tokens is torch.float32", "int64")),
    "tokens-type": (HEAD_LOSSES, {"tokens": [1, 2]}, TypeError, ("tokens", "list")),
    "tokens-high": (HEAD_LOSSES, {"tokens": TOKENS + 11}, ValueError, ("tokens holds the id", "0 … 10", "-100")),
    "tokens-negative": (HEAD_LOSSES, {"tokens": TOKENS - 50}, ValueError, ("tokens holds the id -", "ignore_index")),
    "tokens-device": (HEAD_LOSSES[:2], {"tokens": TOKENS.to(META)}, ValueError, ("tokens is on meta", "cpu")),
    "tokens-high-kl": (("reverse_kl",), {"tokens": TOKENS + 11}, ValueError, ("tokens holds the id", "0 … 10")),
    "tokens-shape-kl": (("reverse_kl",), {"tokens": TOKENS[0]}, ValueError, ("tokens is [3]", "[2, 3]")),
    # Per-token tensors: [3] would broadcast in silence.
    "mask-broadcasts": (REDUCED, {"mask": torch.ones(3)}, ValueError, ("mask is [3]", "hidden is [2, 3, ")),
    "mask-shape": (REDUCED, {"mask": torch.ones(2, 4)}, ValueError, ("mask is [2, 4]", "[2, 3]")),
    "mask-negative": (REDUCED, {"mask": -torch.ones(2, 3)}, ValueError, ("mask holds a weight", "negative")),
    "mask-complex": (REDUCED, {"mask": torch.ones(2, 3) * 1j}, TypeError, ("mask is torch.complex64", "real")),
    "entropy_coef": (POLICY, {"entropy_coef": torch.nan}, ValueError, ("entropy_coef is nan", "finite")),
    "sequence_ids": (POLICY, {"sequence_ids": torch.zeros(2, 3)}, TypeError, ("sequence_ids is torch.float32",)),
    "coef": (POLICY[1:], {"coef": torch.nan}, ValueError, ("coef is nan", "finite")),
    "softcap-inf": (HEAD_LOSSES, {"softcap": torch.inf}, ValueError, ("softcap is inf",)),
    "mask-type": (REDUCED, {"mask": [[1.0] * 3] * 2}, TypeError, ("mask", "list")),
    "mask-device": (REDUCED, {"mask": torch.ones(2, 3, device=META)}, ValueError, ("mask is on meta", "cpu")),
    "advantages": (POLICY[:1], {"advantages": torch.ones(2, 1)}, ValueError, ("advantages is [2, 1]", "[2, 3]")),
    "advantages-type": (POLICY[:1], {"advantages": 1.0}, TypeError, ("advantages", "float")),
    "old": (("policy_gradient",), {"old_logprobs": torch.ones(3)}, ValueError, ("old_logprobs is [3]", "[2, 3]")),
    "sampler": (
        ("sampled_reverse_kl",),
        {"sampler_logprobs": torch.ones(3)},
        ValueError,
        ("sampler_logprobs is [3]", "[2, 3]"),
    ),
    "teacher": (POLICY[1:], {"teacher_logprobs": torch.ones(3)}, ValueError, ("teacher_logprobs is [3]", "[2, 3]")),
    "env_advantages": (POLICY[1:], {"env_advantages": torch.ones(2)}, ValueError, ("env_advantages is [2]", "[2, 3]")),
    "discount": (POLICY[1:], {"discount": 2.0}, ValueError, ("discount is 2.0", "[0, 1]")),
    # The objective.
    "method": (POLICY, {"method": "gspo"}, ValueError, ("method is 'gspo'", "importance_sampling", "cispo")),
    "clip_low-high": (POLICY, {"clip_low": 1.5}, ValueError, ("clip_low is 1.5", "clip_low <= 1")),
    "clip-of-no-use": (
        POLICY,
        {"method": "reinforce", "clip_low": 0.1},
        ValueError,
        ("clip_low is 0.1", "'reinforce'", "cispo"),
    ),
    "clip_low-negative": (POLICY, {"clip_low": -0.1}, ValueError, ("clip_low is -0.1",)),
    "clip_high": (POLICY, {"clip_high": -0.1}, ValueError, ("clip_high is -0.1", "clip_high >= 0")),
    "dual_clip-method": (POLICY, {"dual_clip": 3.0}, ValueError, ("dual_clip is 3.0", "importance_sampling", "ppo")),
    "dual_clip-low": (POLICY, {"dual_clip": 1.0, "method": "ppo"}, ValueError, ("dual_clip is 1.0", "> 1")),
    "truncate_ratio": (POLICY, {"truncate_ratio": 0.0}, ValueError, ("truncate_ratio is 0.0", "> 0")),
    "truncate_ratio-no-sampler": (
        POLICY[:1],
        {"truncate_ratio": 2.0, "old_logprobs": None},
        ValueError,
        ("truncate_ratio is 2.0", "old_logprobs"),
    ),
    "reduction": (REDUCED, {"reduction": "batchmean"}, ValueError, ("reduction is 'batchmean'", "mean, sum")),
    "normalizer-sum": (
        REDUCED,
        {"reduction": "sum", "normalizer": 3.0},
        ValueError,
        ("normalizer is given", "reduction is 'sum'", '"mean"'),
    ),
    "normalizer-none": (REDUCED, {"reduction": "none", "normalizer": 3.0}, ValueError, ("reduction is 'none'",)),
    "normalizer-zero": (REDUCED, {"normalizer": 0}, ValueError, ("normalizer is 0", "> 0")),
    "normalizer-shape": (REDUCED, {"normalizer": torch.ones(2)}, ValueError, ("normalizer is [2]", "0-dim")),
    # The teacher.
    "teacher-tokens": (
        ("reverse_kl",),
        {"teacher_hidden": torch.zeros(2, 4, 7)},
        ValueError,
        ("teacher_hidden is [2, 4, 7]", "student_hidden is [2, 3, 5]", "same tokens"),
    ),
    "teacher-vocabulary": (
        ("reverse_kl",),
        {"teacher_weight": torch.zeros(12, 7)},
        ValueError,
        ("teacher_weight has a vocabulary of 12", "student_weight one of 11", "never pad with zeros"),
    ),
    "teacher-width": (
        ("reverse_kl",),
        {"teacher_weight": torch.zeros(11, 5)},
        ValueError,
        ("teacher_hidden [2, 3, 7]", "teacher_weight [11, 5]"),
    ),
    "teacher-bias": (
        ("reverse_kl",),
        {"teacher_bias": torch.zeros(3)},
        ValueError,
        ("teacher_bias [3]", "teacher_weight [11, 7]"),
    ),
    "student-width": (
        ("reverse_kl",),
        {"student_weight": torch.zeros(11, 4)},
        ValueError,
        ("student_hidden [2, 3, 5]", "student_weight [11, 4]"),
    ),
    "teacher-float64": (
        ("reverse_kl",),
        {"teacher_hidden": P.teacher_hidden.double(), "teacher_weight": P.teacher_weight.double()},
        TypeError,
        ("teacher_hidden is torch.float64", "student_hidden is torch.float32"),
    ),
    "teacher-device": (
        ("reverse_kl",),
        {"teacher_hidden": P.teacher_hidden.to(META), "teacher_weight": P.teacher_weight.to(META)},
        ValueError,
        ("teacher_hidden is on meta", "student_hidden is on cpu"),
    ),
    "teacher-logit_scale": (("reverse_kl",), {"teacher_logit_scale": 0}, ValueError, ("teacher_logit_scale is 0",)),
    "teacher-softcap": (("reverse_kl",), {"teacher_softcap": -1.0}, ValueError, ("teacher_softcap is -1.0",)),
}
EACH = [pytest.param(name, *case[1:], id=f"{name}-{key}") for key, case in CASES.items() for name in case[0]]


@pytest.mark.parametrize(("name", "change", "error", "parts"), EACH)
def test_refused(
    gemms: dict[str, list[int]], name: str, change: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    function, arguments = CALLS[name]
    with pytest.raises(error) as caught:
        function(**{**arguments, **change})
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    assert not any(gemms.values()), "something was computed before the error"


@pytest.mark.parametrize("name", CALLS)
def test_accepted(name: str) -> None:
    """The calls that the cases above change are right themselves."""
    function, arguments = CALLS[name]
    assert torch.as_tensor(function(**arguments)[0]).isfinite().all()


@pytest.mark.parametrize("field", ["teacher_hidden", "teacher_weight", "teacher_bias"])
def test_teacher_that_requires_a_gradient(field: str) -> None:
    function, arguments = CALLS["reverse_kl"]
    arguments = {**arguments, "teacher_bias": P.teacher_bias}
    arguments = {**arguments, field: arguments[field].clone().requires_grad_()}
    with pytest.raises(ValueError, match=r"the teacher requires a gradient.*no_grad.*detach"):
        function(**arguments)
    with torch.no_grad():  # an evaluation with the trained model as its own teacher
        expected = function(**arguments).loss
    arguments[field] = arguments[field].detach()
    assert torch.equal(function(**arguments).loss, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_token_dtypes(dtype: torch.dtype) -> None:
    expected = loss.linear_logprobs(P.hidden, P.weight, TOKENS)
    assert torch.equal(loss.linear_logprobs(P.hidden, P.weight, TOKENS.to(dtype)), expected)


def test_ignore_index_is_an_argument() -> None:
    """0 pads in some tokenizers; −100 is then an id like any other that does not exist."""
    tokens = torch.tensor([[0, 1, 2], [3, 0, 4]])
    logprobs = loss.linear_logprobs(P.hidden, P.weight, tokens, ignore_index=0)
    assert ((logprobs == 0) == (tokens == 0)).all()
    with pytest.raises(ValueError, match=re.escape("the id -100, outside the vocabulary")):
        loss.linear_logprobs(P.hidden, P.weight, tokens - 100, ignore_index=0)
