"""A head in pieces: what several processes compute from their rows of it is what one computes from all of them."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import pieces
import pytest
import torch
from launches import in_group
from loss_cases import (
    DIVERGENCES,
    HEADS,
    LOSSES,
    NEEDS,
    TRAINABLE,
    WAYS,
    Result,
    assert_results_as_accurate,
    eager,
    largest,
    pattern,
    with_gradients,
)
from pieces import TOKEN_STATS, Case, everything, of_dtensors, of_processes
from torch import Tensor

from fastkl.loss import Sparse

TWO, THREE = (6, 5), (5, 2, 4)
PADDED = (6, 5, 2)  # the last process has nothing but padding
CAPPED = HEADS["all-chunked"]
NONE = {"reduction": "none"}
CLASSES = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 1.0, 0.0, 1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
SUMS = 1e-10  # the rounding of float64 sums, relative and absolute


def exact_cases() -> dict[str, Case]:
    found = {f"{name}-of-{len(sizes)}": Case(name, {}, sizes) for name in LOSSES for sizes in (TWO, THREE)}
    for name in LOSSES:
        upstream = {} if name == "linear_logprobs" else NONE
        found[f"{name}-capped"] = Case(name, {**CAPPED, **upstream}, THREE)
        found[f"{name}-frozen"] = Case(name, upstream, TWO, NEEDS["frozen-head"])
        found[f"{name}-forbidden"] = Case(name, {}, THREE, change=pieces.forbidden_on_the_second)
    for name in WAYS:
        found[f"{name}-large"] = Case(name, {}, THREE, change=pieces.large_logits)
        found[f"{name}-poisoned"] = Case(name, {}, TWO, change=pieces.poisoned)
    for name in (*DIVERGENCES, "top_k"):
        found[f"{name}-hard"] = Case(name, {"hard_coef": 0.5, "temperature": 1.4, **NONE}, THREE)
    for name in ("forward_kl", "cross_entropy", "jsd"):
        options = {"per_token": True, "vocab_size": 10}
        found[f"{name}-padded"] = Case(name, options, PADDED)
        found[f"{name}-per-token"] = Case(name, {"per_token": True, "softcap": 2.5}, THREE, lead=(2, 4))
    return found | {
        "reverse_kl-longer-teacher": Case("reverse_kl", {"vocab_size": 10}, PADDED, change=pieces.longer_teacher),
        "reverse_kl-alike": Case("reverse_kl", {}, THREE, change=pieces.alike),
        "classes": Case("cross_entropy", {"class_weight": CLASSES, "z_loss": 0.1}, THREE),
        "classes-unsmoothed": Case("cross_entropy", {"class_weight": CLASSES, "label_smoothing": 0.0}, TWO),
        "weight_grad": Case("policy_gradient", {"weight_grad": None}, THREE),
        "weight_grad-padded": Case("jsd", {"weight_grad": None, "vocab_size": 9}, PADDED),
        "sequences": Case("entropy", {"ratio": "sequence", "reduction": "sequence_mean"}, TWO, lead=(2, 4)),
        "computed-rows": Case("policy_gradient", {"skip_zero_rows": False, "ratio_bounds": (0.9, 1.2)}, TWO),
        "bias": Case("reverse_kl", {}, TWO, NEEDS["bias-only"]),
        "no-gradients": Case("policy_gradient", {}, TWO, ()),
        "all-masked": Case("reverse_kl", {}, TWO, change=pieces.all_masked),
        "no-tokens": Case("policy_gradient", {}, TWO, lead=(0,)),
        "not-finite": Case("cross_entropy", NONE, THREE, change=pieces.not_finite),
        "one-has-none": Case("policy_gradient", {}, (11, 0)),
        "the-first-has-none": Case("skewed_reverse_kl", {}, (0, 11)),
        "token-stats": Case(TOKEN_STATS, {}, THREE),
        "token-stats-padded": Case(TOKEN_STATS, {**CAPPED, "vocab_size": 10}, PADDED, lead=(2, 4)),
        "token-stats-frozen": Case(TOKEN_STATS, {"entropy_grad": False}, TWO, NEEDS["frozen-head"]),
    }


EXACT = exact_cases()
LOW = {
    f"{name}-{str(dtype).removeprefix('torch.')}": Case(name, {}, THREE, dtype=dtype, lead=(12,))
    for name in LOSSES
    for dtype in (torch.float32, torch.bfloat16)
}
REFUSED: dict[str, tuple[Case, str]] = {
    "sparse": (Case("policy_gradient", {"backward": Sparse(seed=1)}, TWO), 'backward is Sparse / backward="exact"'),
    "triton": (Case("policy_gradient", {"backend": "triton"}, TWO), 'backend is "triton" / backend="auto"'),
    "tokens": (Case("policy_gradient", {}, TWO, change=pieces.other_tokens), "different tokens; all of them take"),
    "tokens-on-one": (Case("jsd", {}, TWO, change=pieces.tokens_on_the_first), "different tokens; all of them take"),
    "hidden": (Case("policy_gradient", {}, TWO, change=pieces.other_hidden), "different hidden states"),
    "rows": (Case("policy_gradient", {}, TWO, change=pieces.fewer_rows), "different numbers of tokens (6, 5)"),
    "teacher": (
        Case("jsd", {}, TWO, change=pieces.longer_teacher),
        "teacher has [6, 8] ids / student [6, 5] / vocab_size",
    ),
    "vocab_size": (
        Case("jsd", {"vocab_size": 12}, TWO),
        "vocab_size is 12; / the smallest vocabulary (student_weight 11)",
    ),
    "classes": (
        Case("cross_entropy", {"class_weight": CLASSES[:6]}, TWO),
        "class_weight is [6] but weight has 11 ids",
    ),
    "bad-teacher": (Case("forward_kl", {}, TWO, change=pieces.bad_teacher), "BadNumbers: teacher_weight holds NaN"),
}


@cache
def results() -> list[dict[str, Any]]:
    """Of all cases, in one start of three processes."""
    refused = {f"refused-{key}": case for key, (case, _) in REFUSED.items()}
    return in_group(of_processes, EXACT | LOW | refused, count=3)


def parts_of(key: str, case: Case) -> list[Any]:
    return [result[key] for result in results()[: len(case.sizes)]]


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the head side by side; all else is the same on all processes, bit for bit."""
    found = {}
    for name, one in parts[0].items():
        others = [part[name] for part in parts]
        apart = name in ("gradient weight", "gradient bias")
        assert apart or all(torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0)) for other in others), name
        found[name] = torch.cat(others) if apart else one
    return found


def assert_same(key: str, ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys(), key
    for name, one in ours.items():
        size = largest(expected[name].double().nan_to_num(0.0, 0.0, 0.0))
        torch.testing.assert_close(
            one,
            expected[name],
            rtol=SUMS,
            atol=SUMS * max(1.0, size),
            equal_nan=True,
            msg=partial("{}, {}: {}".format, key, name),
        )


@pytest.mark.parametrize("key", EXACT)
def test_as_the_whole_head(key: str) -> None:
    case = EXACT[key]
    parts = parts_of(key, case)
    assert all(isinstance(part, dict) for part in parts), parts
    assert_same(key, merged(parts), everything(case, case.problem(), **case.options))


def test_a_student_that_is_its_teacher() -> None:
    found = merged(parts_of("reverse_kl-alike", EXACT["reverse_kl-alike"]))
    assert found["loss"] == 0.0
    assert all(bool((one == 0).all()) for name, one in found.items() if name.startswith("gradient"))


@pytest.mark.parametrize("key", LOW)
def test_as_accurate(key: str) -> None:
    """By the rule of the whole head: against what PyTorch makes of it in this dtype, and the truth."""
    case = LOW[key]
    p, found = case.problem(), merged(parts_of(key, case))
    ours = Result(found["loss"], {field: found[f"gradient {field}"] for field in TRAINABLE})
    if case.name == "linear_logprobs":
        p = p._replace(mask=None)
    peer, exact = with_gradients(eager, case.name, p), with_gradients(eager, case.name, p.double())
    assert_results_as_accurate(ours, peer, exact, p)


@pytest.mark.parametrize("key", REFUSED)
def test_refused_on_all_processes(key: str) -> None:
    case, message = REFUSED[key]
    for part in parts_of(f"refused-{key}", case):
        assert isinstance(part, str), part
        assert re.search(pattern(message), part), part


FEW = 10 * 17  # numbers that a process may give away for 10 tokens
SPLIT = {  # as torch.chunk splits ids
    **{name: Case(name, {}, (3, 3, 3, 2), lead=(10,)) for name in ("policy_gradient", "top_k", "jsd")},
    "entropies": Case("entropy", NONE, (6, 5), lead=(10,)),
    "padded": Case("forward_kl", {"vocab_size": 10, "per_token": True}, (6, 5), lead=(10,)),
}
APART = {
    "policy_gradient": Case("policy_gradient", {}, (6, 5), change=pieces.other_tokens),
    "reverse_kl": Case("reverse_kl", NONE, (3, 3, 3, 2), change=pieces.other_hidden),
}


@cache
def of_four() -> list[dict[str, Any]]:
    return in_group(of_dtensors, SPLIT | {f"apart-{key}": case for key, case in APART.items()}, count=4)


@pytest.mark.parametrize("key", SPLIT)
def test_a_dtensor_needs_no_group(key: str) -> None:
    """On two processes of four it is there twice: their gradients are averaged. Nothing of the size of a head is sent."""
    case = SPLIT[key]
    for results in of_four():
        found, called = results[key]
        assert_same(key, found, everything(case, case.problem(), **case.options))
        (first, _), *others = called
        assert first == "all_gather"
        assert [name for name, _ in others] == ["all_gather"] * (len(others) - 1) + ["all_reduce"]
        assert others[-1][1] <= case.problem().hidden.numel()
        assert all(1 <= size <= FEW for _, size in others[:-1])
        at_most = 3 if "per_token" in case.options else 4 if case.options else 2  # 4: twice, in backward
        assert len(others) - 1 <= at_most


@pytest.mark.parametrize("key", APART)
def test_other_tokens_gather_a_dtensor(key: str) -> None:
    """As FSDP 2 has them: each process its own loss, the gradients of the head averaged."""
    found = [results[f"apart-{key}"] for results in of_four()]
    assert all(len(called) == 1 for _, called in found)
    assert len({float(one["loss"].sum()) for one, _ in found}) > 1
    for one, _ in found:
        assert torch.equal(one["gradient weight"], found[0][0]["gradient weight"])
