"""A head in pieces: what several processes compute from their rows of it is what one computes from all of them."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import pieces
import pytest
import torch
from accuracy import Result, assert_as_accurate, assert_results_as_accurate, largest, with_gradients
from groups import in_group
from loss_cases import DIVERGENCES, HEADS, LOSSES, NEEDS, WAYS, eager, pattern
from pieces import LIKELIEST, TOKEN_STATS, Case, everything, merged, of_dtensors, of_processes
from problem import TRAINABLE
from torch import Tensor

from fastkl.loss import Sparse

TWO, THREE = (6, 5), (5, 2, 4)
PADDED = (6, 5, 2)  # the last process has nothing but padding
CAPPED = HEADS["all-chunked"]
NONE = {"reduction": "none"}
LIKELIEST_OPTIONS = {
    "top": {**CAPPED, "vocab_size": 10},
    "list": {**CAPPED, "vocab_size": 10},
    "ranks": {"chunk_size": 4, "vocab_size": 10},
}
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
        **{
            f"{name}-{key}": Case(name, options, sizes, (), change=change)
            for name in LIKELIEST
            for key, options, sizes, change in (
                ("of-2", {}, TWO, None),
                ("capped", LIKELIEST_OPTIONS[name], PADDED, None),
                ("one-has-none", {"chunk_size": 2}, (0, 11, 0), None),
                ("forbidden", {}, THREE, pieces.one_forbidden),
                ("large", {}, THREE, pieces.large_logits),
                ("not-finite", {}, THREE, pieces.not_finite),
            )
            if (name, key) != ("top", "not-finite")  # NaN has no order
        },
        "top-more-than-each": Case("top", {"k": 7}, THREE, (), lead=(2, 4), change=pieces.one_forbidden),
        "top-all": Case("top", {"k": 11}, THREE, ()),
        "list-no-ids": Case("list", {"k": 0}, TWO, ()),
        "ranks-no-tokens": Case("ranks", {}, TWO, (), lead=(0,)),
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
LOW |= {f"{name}-float32": Case(name, {}, THREE, (), dtype=torch.float32, lead=(12,)) for name in ("top", "list")}
REFUSED: dict[str, tuple[Case, str]] = {
    "sparse": (Case("policy_gradient", {"backward": Sparse(seed=1)}, TWO), 'backward is Sparse / backward="exact"'),
    **{
        f"triton-{name}": (Case(name, {"backend": "triton", **options}, TWO), 'backend is "triton" / backend="auto"')
        for name, options in (("jsd", {}), ("cross_entropy", {"per_token": True, "label_smoothing": 0.0}))
    },
    "tokens": (Case("policy_gradient", {}, TWO, change=pieces.other_tokens), "different tokens: / all of them take"),
    "tokens-on-one": (
        Case("jsd", {}, TWO, change=pieces.tokens_on_the_first),
        "different tokens: [6] of torch.int64 / None",
    ),
    "hidden": (
        Case("policy_gradient", {}, TWO, change=pieces.other_hidden),
        "different hidden: / on process 0, / on process 1",
    ),
    "rows": (
        Case("policy_gradient", {}, TWO, change=pieces.fewer_rows),
        "different hidden: [6, 5] / on process 0, [5, 5]",
    ),
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


@pytest.mark.parametrize("key", [key for key, case in LOW.items() if case.needs])
def test_as_accurate(key: str) -> None:
    """By the rule of the whole head: against what PyTorch makes of it in this dtype, and the truth."""
    case = LOW[key]
    p, found = case.problem(), merged(parts_of(key, case))
    ours = Result(found["loss"], {field: found[f"gradient {field}"] for field in TRAINABLE})
    if case.name == "linear_logprobs":
        p = p._replace(mask=None)
    peer, exact = with_gradients(eager, case.name, p), with_gradients(eager, case.name, p.double())
    assert_results_as_accurate(ours, peer, exact, p)


@pytest.mark.parametrize("name", ["top", "list"])
def test_likeliest_as_accurate(name: str) -> None:
    """In float32, against the truth and what the whole head makes of it; ranks are whole numbers."""
    case = LOW[f"{name}-float32"]
    p, found = case.problem(), merged(parts_of(f"{name}-float32", case))
    whole, exact = everything(case, p), everything(case, p.double())
    assert_as_accurate(name, found["logprobs"], whole["logprobs"], exact["logprobs"], slack=1e-7)
    assert torch.equal(found.get("ids", whole.get("ids", p.tokens)), whole.get("ids", p.tokens))


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
    **{name: Case(name, {}, (3, 3, 3, 2), (), lead=(10,)) for name in LIKELIEST},
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
        if case.name not in LIKELIEST:
            last, size = others.pop()
            assert last == "all_reduce"
            assert size <= case.problem().hidden.numel()
        assert all(name == "all_gather" and 1 <= size <= FEW for name, size in others)
        at_most = 3 if "per_token" in case.options else 4 if case.options else 2  # 4: twice, in backward
        assert len(others) <= at_most


@pytest.mark.parametrize("key", APART)
def test_other_tokens_gather_a_dtensor(key: str) -> None:
    """As FSDP 2 has them: each process its own loss, the gradients of the head averaged."""
    found = [results[f"apart-{key}"] for results in of_four()]
    assert all(len(called) == 1 for _, called in found)
    assert len({float(one["loss"].sum()) for one, _ in found}) > 1
    for one, _ in found:
        assert torch.equal(one["gradient weight"], found[0][0]["gradient weight"])
