"""Bad input: the type of the error, a message that names the argument and what it got, and nothing computed before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import LOSSES, fused, pattern, teacher_list
from problem import make_problem
from torch import inf, nan, ones, zeros

from fastkl import loss

P = make_problem((2, 3), vocabulary=11, dim=5, dtype=torch.float32)
P = P._replace(tokens=P.tokens.clamp(min=0), mask=None, bias=None, teacher_bias=None)
OWN, FP32 = {"weight": P.weight.clone().requires_grad_()}, torch.float32
META = "meta"  # a second device that every machine has
Z = zeros(2, 3, 11)
IDS, LOGPROBS = teacher_list(P, 4)


def teacher(where: Any) -> dict[str, Any]:
    return {field: getattr(P, field).to(where) for field in ("teacher_hidden", "teacher_weight")}


HEAD = ("linear_logprobs", "policy_gradient", "sampled_reverse_kl")
ALL = (*HEAD, "reverse_kl", "top_k")
REDUCED, POLICY, PG, SAMPLED = ALL[1:], HEAD[1:], HEAD[1:2], HEAD[2:]
KL, JSD, TOP_K, TAIL = ("reverse_kl",), ("jsd",), ("top_k",), ("sampled_tail",)
OWN_LOGITS = {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}
# (losses, what is changed, the error: parts of its message)
CASES: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    # The head.
    (HEAD, {"weight": zeros(11, 4)}, "ValueError: hidden [2, 3, 5] / weight [11, 4]"),
    (HEAD, {"weight": P.weight.t()}, "ValueError: weight [5, 11] / [V, D]"),
    (HEAD, {"weight": zeros(5)}, "ValueError: weight [5] / [V, D]"),
    (HEAD, {"weight": zeros(0, 5)}, "ValueError: weight [0, 5] / empty vocabulary"),
    (HEAD, {"weight": [[0.0]]}, "TypeError: weight / list"),
    (HEAD, {"weight": P.weight.to(META)}, "ValueError: weight is on meta / hidden is on cpu"),
    (HEAD, {"weight": P.weight.double()}, "TypeError: hidden is torch.float32, weight is torch.float64 / autocast"),
    (HEAD, {"hidden": P.hidden.half(), "weight": P.weight.bfloat16()}, "TypeError: hidden is torch.float16 / bfloat16"),
    (HEAD, {"hidden": torch.tensor(1.0)}, "ValueError: hidden [] / [..., D]"),
    (HEAD, {"hidden": None}, "TypeError: hidden / NoneType"),
    (HEAD, {"hidden": zeros(2, 3, 5).long()}, "TypeError: hidden is torch.int64 / float32"),
    (HEAD, {"bias": zeros(5)}, "ValueError: bias [5] / weight [11, 5] / [V]"),
    (HEAD, {"bias": torch.tensor(0.0)}, "ValueError: bias [] / [V]"),
    (HEAD, {"bias": zeros(11).double()}, "TypeError: hidden is torch.float32 / bias is torch.float64"),
    (HEAD, {"bias": 0.5}, "TypeError: bias / float"),
    (ALL, {"temperature": 0.0}, "ValueError: temperature is 0.0 / > 0 / greedy"),
    (ALL, {"temperature": nan}, "ValueError: temperature is nan"),
    (ALL, {"logit_scale": -2.0}, "ValueError: logit_scale is -2.0 / > 0"),
    (ALL, {"softcap": 0.0}, "ValueError: softcap is 0.0 / None"),
    (HEAD, {"softcap": inf}, "ValueError: softcap is inf"),
    (ALL, {"chunk_size": 0}, "ValueError: chunk_size is 0 / at least 1"),
    (ALL, {"chunk_size": 4.0}, "ValueError: chunk_size is 4.0 / whole number"),
    (ALL, {"backend": "cuda"}, "ValueError: backend is 'cuda' / auto, triton, torch"),
    (ALL, {"weight_grad": zeros(11, 5)}, "ValueError: weight_grad is given / does not require a gradient"),
    (
        HEAD,
        OWN | {"weight_grad": zeros(5, 11)},
        f"ValueError: weight_grad is [5, 11] of {FP32} / expected [11, 5] of {FP32}",
    ),
    (
        HEAD,
        OWN | {"weight_grad": zeros(11, 5).half()},
        "ValueError: weight_grad is [11, 5] of torch.float16 / summed in",
    ),
    # The tokens.
    (HEAD, {"tokens": P.tokens[0]}, "ValueError: tokens is [3] / hidden is [2, 3, 5] / [2, 3]"),
    (HEAD, {"tokens": P.tokens.float()}, "TypeError: tokens is torch.float32 / int64"),
    (HEAD, {"tokens": [1, 2]}, "TypeError: tokens / list"),
    (HEAD, {"tokens": P.tokens + 11}, "ValueError: tokens holds the id / 0 … 10 / -100"),
    (HEAD, {"tokens": P.tokens - 50}, "ValueError: tokens holds the id - / ignore_index"),
    (HEAD, {"tokens": P.tokens.to(META)}, "ValueError: tokens is on meta / cpu"),
    (KL, {"tokens": P.tokens + 11}, "ValueError: tokens holds the id / 0 … 10"),
    (KL, {"tokens": P.tokens[0]}, "ValueError: tokens is [3] / [2, 3]"),
    # Per-token tensors: [3] would broadcast in silence.
    (REDUCED, {"mask": ones(3)}, "ValueError: mask is [3] / hidden is [2, 3, "),
    (REDUCED, {"mask": ones(2, 4)}, "ValueError: mask is [2, 4] / [2, 3]"),
    (REDUCED, {"mask": -ones(2, 3)}, "ValueError: mask holds a weight / negative"),
    (REDUCED, {"mask": ones(2, 3) * 1j}, "TypeError: mask is torch.complex64 / real"),
    (REDUCED, {"mask": [[1.0] * 3] * 2}, "TypeError: mask / list"),
    (REDUCED, {"mask": ones(2, 3, device=META)}, "ValueError: mask is on meta / cpu"),
    (PG, {"advantages": ones(3)}, "ValueError: advantages is [3] / [2, 3]"),
    (PG, {"advantages": ones(1, 3)}, "ValueError: advantages is [1, 3] / [2, 3]"),
    (
        PG,
        {"advantages": ones(2), "sequence_ids": IDS[..., 0]},
        "ValueError: advantages is [2], one per row / sequence_ids",
    ),
    (PG, {"advantages": 1.0}, "TypeError: advantages / float"),
    (PG, {"old_logprobs": ones(3)}, "ValueError: old_logprobs is [3] / [2, 3]"),
    (PG, {"old_logprobs": P.tokens}, "TypeError: old_logprobs is torch.int64; expected floating-point log-probs"),
    (SAMPLED, {"sampler_logprobs": ones(3)}, "ValueError: sampler_logprobs is [3] / [2, 3]"),
    (SAMPLED, {"teacher_logprobs": ones(3)}, "ValueError: teacher_logprobs is [3] / [2, 3]"),
    (SAMPLED, {"env_advantages": ones(3)}, "ValueError: env_advantages is [3] / [2, 3]"),
    (SAMPLED, {"baseline": ones(2)}, "ValueError: baseline is [2] / [2, 3]"),
    # The objective.
    (POLICY, {"entropy_coef": nan}, "ValueError: entropy_coef is nan / finite"),
    (POLICY, {"sequence_ids": zeros(2, 3)}, "TypeError: sequence_ids is torch.float32"),
    (PG, {"sequence_ids": zeros(3)}, "ValueError: sequence_ids is [3] but hidden is [2, 3, 5]"),
    (SAMPLED, {"coef": nan}, "ValueError: coef is nan / finite"),
    (SAMPLED, {"discount": 2.0}, "ValueError: discount is 2.0 / [0, 1]"),
    (POLICY, {"method": "gspo"}, "ValueError: method is 'gspo' / importance_sampling / cispo"),
    (POLICY, {"clip_low": 1.5}, "ValueError: clip_low is 1.5 / clip_low <= 1"),
    (POLICY, {"method": "reinforce", "clip_low": 0.1}, "ValueError: clip_low is 0.1 / 'reinforce' / cispo"),
    (POLICY, {"clip_low": -0.1}, "ValueError: clip_low is -0.1"),
    (POLICY, {"clip_high": -0.1}, "ValueError: clip_high is -0.1 / clip_high >= 0"),
    (POLICY, {"dual_clip": 3.0}, "ValueError: dual_clip is 3.0 / importance_sampling / ppo"),
    (POLICY, {"dual_clip": 1.0, "method": "ppo"}, "ValueError: dual_clip is 1.0 / > 1"),
    (POLICY, {"truncate_ratio": 0.0}, "ValueError: truncate_ratio is 0.0 / > 0"),
    (PG, {"truncate_ratio": 2.0, "old_logprobs": None}, "ValueError: truncate_ratio is 2.0 / old_logprobs"),
    (POLICY, {"ratio": "batch"}, "ValueError: ratio is 'batch'; use one of token, sequence"),
    (PG, {"ratio_bounds": (0.5, 2.0), "old_logprobs": None}, "ValueError: ratio_bounds is (0.5, 2.0) / old_logprobs"),
    (POLICY, {"ratio_bounds": (2.0, 0.5)}, "ValueError: ratio_bounds is (2.0, 0.5) / low < high"),
    (POLICY, {"ratio_bounds": (-0.5, 2.0)}, "ValueError: ratio_bounds is (-0.5, 2.0) / 0 <= low"),
    (POLICY, {"ratio_bounds": (nan, 2.0)}, "ValueError: ratio_bounds is (nan, 2.0)"),
    (POLICY, {"ratio_bounds": 2.0}, "ValueError: ratio_bounds is 2.0 / (low, high)"),
    (POLICY, {"ratio_bounds": (None, 2.0)}, "ValueError: ratio_bounds is (None, 2.0) / 0 and inf"),
    (POLICY, {"ref_kl_coef": 0.1}, "ValueError: ref_kl_coef is 0.1 and needs ref_logprobs"),
    (POLICY, {"ref_kl_coef": -0.1, "ref_logprobs": -ones(2, 3)}, "ValueError: ref_kl_coef is -0.1 / >= 0"),
    (POLICY, {"ref_kl_coef": nan, "ref_logprobs": -ones(2, 3)}, "ValueError: ref_kl_coef is nan / finite"),
    (POLICY, {"ref_kl": "k4"}, "ValueError: ref_kl is 'k4'; use one of k1, k2, k3"),
    (POLICY, {"ref_logprobs": -ones(3)}, "ValueError: ref_logprobs is [3] / [2, 3]"),
    (POLICY, {"ref_logprobs": ones(2, 3)}, "BadNumbers: ref_logprobs holds 1, / at most 0"),
    (POLICY, {"method": "cispo", "clip_high": -1.0}, "ValueError: clip_high is -1.0 / clip_high > -1"),
    (POLICY, {"method": "cispo", "clip_low": 0.1, "clip_high": -0.2}, "ValueError: clip_high is -0.2 / >= -clip_low"),
    (
        POLICY,
        {"reduction": "batchmean"},
        "ValueError: reduction is 'batchmean'; use one of mean, sum, sequence_mean, none",
    ),
    (REDUCED, {"reduction": "batchmean"}, "ValueError: reduction is 'batchmean' / mean, sum"),
    (
        REDUCED,
        {"reduction": "sum", "normalizer": 3.0},
        "ValueError: normalizer is given / reduction is 'sum' / \"mean\"",
    ),
    (REDUCED, {"reduction": "none", "normalizer": 3.0}, "ValueError: reduction is 'none'"),
    (REDUCED, {"normalizer": 0}, "ValueError: normalizer is 0 / > 0"),
    (POLICY, {"reduction": "sequence_mean", "normalizer": -1.0}, "ValueError: normalizer is -1.0"),
    (REDUCED, {"normalizer": torch.tensor(0)}, "ValueError: normalizer is 0, but this call counts 6; / global count"),
    (REDUCED, {"normalizer": torch.tensor(-2.0)}, "ValueError: normalizer is -2.0 / > 0"),
    (REDUCED, {"normalizer": torch.tensor(nan)}, "ValueError: normalizer is nan / > 0"),
    (REDUCED, {"normalizer": ones(2)}, "ValueError: normalizer is [2] / 0-dim"),
    # The teacher's head.
    (
        KL,
        {"teacher_hidden": zeros(2, 4, 7)},
        "ValueError: teacher_hidden is [2, 4, 7] / student_hidden is [2, 3, 5] / same",
    ),
    (
        KL,
        {"teacher_weight": zeros(12, 7)},
        "ValueError: teacher_weight has a vocabulary of 12 / student_weight one of 11 / never pad with zeros",
    ),
    (KL, {"teacher_weight": zeros(11, 5)}, "ValueError: teacher_hidden [2, 3, 7] / teacher_weight [11, 5]"),
    (KL, {"teacher_bias": zeros(3)}, "ValueError: teacher_bias [3] / teacher_weight [11, 7]"),
    (KL, {"weight": zeros(11, 4)}, "ValueError: student_hidden [2, 3, 5] / student_weight [11, 4]"),
    (KL, teacher(torch.float64), "TypeError: teacher_hidden is torch.float64 / student_hidden is torch.float32"),
    (KL, teacher(META), "ValueError: teacher_hidden is on meta / student_hidden is on cpu"),
    (KL, {"teacher_logit_scale": 0}, "ValueError: teacher_logit_scale is 0"),
    (KL, {"teacher_softcap": -1.0}, "ValueError: teacher_softcap is -1.0"),
    (JSD, {"teacher_temperature": 0.0}, "ValueError: teacher_temperature is 0.0"),
    (JSD, {"vocab_size": 12}, "ValueError: vocab_size is 12; / (student_weight 11, teacher_weight 11)"),
    (JSD, {"vocab_size": 0}, "ValueError: vocab_size is 0"),
    (JSD, {"vocab_size": 3, "tokens": torch.full((2, 3), 5)}, "ValueError: tokens holds the id 5, outside"),
    # Other forms of a teacher.
    (JSD, {"teacher_logits": Z, "teacher_hidden": P.teacher_hidden}, "ValueError: give teacher_hidden and"),
    (JSD, {"teacher_logits": Z, "teacher_bias": zeros(11)}, "ValueError: teacher_logits alone"),
    (
        JSD,
        {"teacher_weight": None, "teacher_bias": zeros(11)},
        "ValueError: is given as teacher_hidden, teacher_bias; give",
    ),
    (JSD, OWN_LOGITS, "ValueError: the teacher is given as nothing"),
    (JSD, {"teacher_logits": [[0.0]]}, "TypeError: teacher_logits must be a tensor / or a function / list"),
    (JSD, {"teacher_logits": Z[0]}, "ValueError: teacher_logits is [3, 11] but student_hidden is [2, 3, 5]"),
    (JSD, {"teacher_logits": Z.long()}, "TypeError: teacher_logits is torch.int64"),
    (JSD, {"teacher_logits": Z.double()}, "TypeError: teacher_logits is torch.float64 but student_hidden is"),
    (JSD, {"teacher_logits": Z.clone().requires_grad_()}, "ValueError: the teacher requires a gradient"),
    (JSD, {"teacher_logits": zeros(2, 3, 12)}, "ValueError: a vocabulary of 12 / vocab_size=len"),
    # The divergences' own options.
    (JSD, {"beta": 1.5}, "ValueError: beta is 1.5; it must be in [0, 1]"),
    (JSD, {"alpha": 0.5}, "TypeError: unexpected keyword argument 'alpha'"),
    (("skewed_forward_kl",), {"alpha": 1.0}, "ValueError: alpha is 1.0; it must be in [0, 1)"),
    (("skewed_reverse_kl",), {"alpha": -0.1}, "ValueError: alpha is -0.1"),
    (("density_power",), {"power": -0.1}, "ValueError: power is -0.1; it must be in [0, 1000]"),
    (("density_power",), {"power": nan}, "ValueError: power is nan"),
    (("density_power",), {"power": "1"}, "TypeError: power is '1'; expected a number"),
    # A list.
    (TOP_K, {"direction": "both"}, "ValueError: direction is 'both'; use one of reverse, forward"),
    (TOP_K, {"tail": "cut"}, "ValueError: tail is 'cut'; use one of bucket, renormalise, drop, sampled"),
    (TOP_K, {"vocab_size": 12}, "ValueError: vocab_size is 12; it must be an int in 1 … / (weight 11)"),
    (TOP_K, {"teacher_ids": IDS[0]}, "ValueError: teacher_ids is [3, 4] but hidden is [2, 3, 5]"),
    (
        TOP_K,
        {"teacher_ids": IDS[..., :0]},
        "ValueError: teacher_ids is [2, 3, 0]: expected at least one entry per token",
    ),
    (TOP_K, {"teacher_logprobs": LOGPROBS[..., :2]}, "ValueError: teacher_ids is / 4] but teacher_logprobs is / 2]"),
    (TOP_K, {"teacher_ids": LOGPROBS}, "TypeError: teacher_ids is torch.float32; expected integers"),
    (TOP_K, {"teacher_ids": IDS.index_fill(2, torch.tensor([0, 1]), 5)}, "ValueError: lists 5 twice in a row"),
    (TOP_K, {"teacher_logprobs": LOGPROBS * 0 - 0.1}, "BadNumbers: sum to a probability of / not logits"),
    (TOP_K, {"teacher_ids": [[1]]}, "TypeError: teacher_ids must be a tensor, not list"),
    (TOP_K, {"teacher_ids": IDS + 11}, "ValueError: teacher_ids holds / , outside the vocabulary / 0 … 10"),
    (TOP_K, {"teacher_ids": torch.full_like(IDS, -1)}, "ValueError: a row without any id"),
    (TOP_K, {"teacher_logprobs": LOGPROBS.clone().requires_grad_()}, "ValueError: requires a gradient"),
    # A sampled tail.
    (TAIL, {"direction": "forward"}, "ValueError: tail is \"sampled\" but direction is 'forward' / reverse"),
    (TAIL, {"tokens": None}, 'ValueError: tail is "sampled" and needs the sampled tokens: pass tokens='),
    (TAIL, {"token_teacher_logprobs": None}, "ValueError: needs the teacher's / pass token_teacher_logprobs="),
    (TAIL, {"token_teacher_logprobs": ones(3)}, "ValueError: token_teacher_logprobs is [3] / [2, 3]"),
    (TAIL, {"token_teacher_logprobs": LOGPROBS}, "ValueError: token_teacher_logprobs is [2, 3, 4] / [2, 3]"),
    (TAIL, {"token_teacher_logprobs": [0.0]}, "TypeError: token_teacher_logprobs must be a tensor"),
    (TAIL, {"token_teacher_logprobs": P.tokens}, "TypeError: token_teacher_logprobs is torch.int64; expected float"),
    (TAIL, {"sampler_logprobs": ones(3)}, "ValueError: sampler_logprobs is [3] / [2, 3]"),
    (TAIL, {"sampler_logprobs": -ones(2, 3, device=META)}, "ValueError: sampler_logprobs is on meta / cpu"),
    (TAIL, {"sampler_logprobs": None}, "ValueError: truncate_ratio is 1.3 and needs sampler_logprobs"),
    (TAIL, {"truncate_ratio": 0.0}, "ValueError: truncate_ratio is 0.0 / > 0"),
    (TAIL, {"tail_weight": 1.5}, "ValueError: tail_weight is 1.5; it must be in [0, 1]"),
    (TAIL, {"tail_weight": nan}, "ValueError: tail_weight is nan"),
    (TAIL, {"tail_weight": None}, "TypeError: tail_weight is None; expected a number"),
    (TAIL, {"tail_baseline": nan}, "ValueError: tail_baseline is nan; it must be finite"),
    (TAIL, {"tail_baseline": "mean"}, "TypeError: tail_baseline is 'mean'; expected a number"),
    (TAIL, {"tail_baseline": zeros(3)}, "ValueError: tail_baseline is [3] / [2, 3]"),
    (TAIL, {"tail_baseline": torch.full((2, 3), inf)}, "BadNumbers: tail_baseline holds NaN or an infinity"),
    (TAIL, {"tail_baseline": torch.tensor(nan)}, "BadNumbers: tail_baseline holds NaN or an infinity"),
    *(
        (TOP_K, {**other, name: value}, f'ValueError: {name} is {said} but tail is / it belongs to tail="sampled"')
        for other in ({}, {"tail": "drop"}, {"direction": "forward"})
        for name, value, said in (
            ("token_teacher_logprobs", -ones(2, 3), "given"),
            ("sampler_logprobs", -ones(2, 3), "given"),
            ("tail_baseline", 0.0, "0.0"),
            ("tail_weight", 0.5, "0.5"),
            ("truncate_ratio", 2.0, "2.0"),
        )
    ),
]
# What is above 0, or NaN, in log-probs of tokens that take part.
CASES += [
    (names, {field: torch.full(shape, value)}, f"BadNumbers: {field} holds {said}")
    for names, field, shape in (
        (PG, "old_logprobs", (2, 3)),
        (SAMPLED, "sampler_logprobs", (2, 3)),
        (SAMPLED, "teacher_logprobs", (2, 3)),
        (TOP_K, "teacher_logprobs", (2, 3, 4)),
        (TAIL, "teacher_logprobs", (2, 3, 4)),
        (TAIL, "token_teacher_logprobs", (2, 3)),
        (TAIL, "sampler_logprobs", (2, 3)),
    )
    for value, said in ((0.5, "0.5 / at most 0 / Give log-probs"), (inf, "inf"), (nan, "NaN / mask"))
]
EACH = [
    pytest.param(name, change, message, id=f"{name}-{'-'.join(change)}")
    for names, change, message in CASES
    for name in names
]


@pytest.mark.parametrize(("name", "change", "message"), EACH)
def test_refused(gemms: dict[str, list[int]], name: str, change: dict[str, Any], message: str) -> None:
    own = {field: change[field] for field in ("hidden", "weight") if field in change}
    rest = {field: value for field, value in change.items() if field not in own}
    with pytest.raises((TypeError, ValueError)) as caught:
        fused(name, P._replace(**own), **rest)
    error, _, message = message.partition(": ")
    assert type(caught.value).__name__ == error
    for part in message.split(" / "):
        assert part in str(caught.value)
    assert not any(gemms.values()), "something was computed before the error"


@pytest.mark.parametrize("name", LOSSES)
def test_accepted(name: str) -> None:
    """The calls that the cases above change are right themselves."""
    assert fused(name, P).isfinite().all()


@pytest.mark.parametrize("name", REDUCED)
def test_masked_tokens_may_be_any_id(name: str) -> None:
    p = P._replace(mask=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    anything = torch.tensor([[0, -1, 0], [10**6, 0, 0]])
    assert torch.equal(fused(name, p._replace(tokens=p.tokens.where(p.mask != 0, anything))), fused(name, p))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fused(name, p._replace(tokens=p.tokens.where(p.mask == 0, anything - 1)))


@pytest.mark.parametrize("field", ["teacher_hidden", "teacher_weight", "teacher_bias"])
def test_teacher_that_requires_a_gradient(field: str) -> None:
    """In a graph it is refused. A Parameter of a model that somebody trains is what people have: it is detached."""
    p = P._replace(teacher_bias=zeros(11))
    leaf = getattr(p, field).clone().requires_grad_()
    with pytest.raises(ValueError, match=r"the teacher requires a gradient.*no_grad.*detach"):
        fused("reverse_kl", p._replace(**{field: 1.0 * leaf}))
    expected = fused("reverse_kl", p)
    with torch.no_grad():  # an evaluation with the trained model as its own teacher
        assert torch.equal(fused("reverse_kl", p._replace(**{field: 1.0 * leaf})), expected)
    q = p.leaves(("hidden", "weight"))
    value = fused("reverse_kl", q._replace(**{field: leaf}))
    assert torch.equal(value, expected)
    value.backward()
    assert leaf.grad is None
    assert q.weight.grad is not None


def test_a_head_that_teaches_itself() -> None:
    """One Parameter for student and teacher: its gradient is the student's."""
    head = torch.nn.Parameter(P.weight)
    hidden = P.hidden + 0.1
    fused("reverse_kl", P._replace(weight=head, teacher_hidden=hidden, teacher_weight=head)).backward()
    copy = torch.nn.Parameter(P.weight)
    fused("reverse_kl", P._replace(weight=copy, teacher_hidden=hidden, teacher_weight=P.weight)).backward()
    assert torch.equal(head.grad, copy.grad)


ADVANTAGES: list[tuple[dict[str, Any], str]] = [
    ({"teacher_logprobs": zeros(2, 4)}, "teacher_logprobs is [2, 4] / [2, 3]"),
    (
        {"mask": ones(3)},
        "mask is [3] but sampler_logprobs is [2, 3]",
    ),  # it would broadcast, silently, to every sequence
    ({"sequence_ids": ones(2, 1)}, "sequence_ids is [2, 1] / [2, 3]"),
    ({"baseline": zeros(3)}, "baseline is [3] but sampler_logprobs is [2, 3]"),
    ({"discount": 1.5}, "discount is 1.5; it must be in [0, 1]"),
    ({"discount": -0.5}, "discount is -0.5"),
    ({"discount": nan}, "discount is nan"),
    ({"mask": ones(2, 3, device=META)}, "mask is on meta / is on cpu"),
    ({"power": -0.5}, "power is -0.5; it must be in [0, 1000] / 0: the reverse KL"),
    ({"power": 1001}, "power is 1001"),
    ({"power": nan}, "power is nan"),
    ({"mask": -ones(2, 3)}, "mask holds a weight that is negative"),
    ({"mask": ones(2, 3) * nan}, "mask holds a weight / not finite"),
]


@pytest.mark.parametrize(("change", "message"), ADVANTAGES)
def test_advantages_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=pattern(message)):
        loss.reverse_kl_advantages(**{"sampler_logprobs": zeros(2, 3), "teacher_logprobs": zeros(2, 3), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler_logprobs": -torch.ones(2, 3, dtype=torch.int64)}, "sampler_logprobs is torch.int64 / log-probs"),
        ({"teacher_logprobs": zeros(2, 3) * 1j}, "teacher_logprobs is torch.complex64"),
        ({"baseline": zeros(2, 3) * 1j}, "baseline is torch.complex64; expected real numbers"),
        ({"mask": zeros(2, 3) * 1j}, "mask is torch.complex64; expected real numbers"),
    ],
)
def test_advantages_of_other_dtypes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=pattern(message)):
        loss.reverse_kl_advantages(**{"sampler_logprobs": zeros(2, 3), "teacher_logprobs": zeros(2, 3), **change})


EXTRAPOLATED: list[tuple[dict[str, Any], str]] = [
    ({"ref_logprobs": zeros(2, 4)}, "ref_logprobs is [2, 4] but sampler_logprobs is [2, 3]"),
    ({"ref_logprobs": ones(2, 3)}, "ref_logprobs holds 1, and the log of a probability is at most 0"),
    ({"extrapolate": -1.0}, "extrapolate is -1.0; it must be >= 0"),
    ({"extrapolate": nan}, "extrapolate is nan; it must be finite"),
]


@pytest.mark.parametrize(("change", "message"), EXTRAPOLATED)
def test_extrapolated_advantages_refused(change: dict[str, Any], message: str) -> None:
    given = {"sampler_logprobs": zeros(2, 3), "teacher_logprobs": zeros(2, 3), "ref_logprobs": zeros(2, 3)}
    with pytest.raises(ValueError, match=pattern(message)):
        loss.extrapolated_advantages(**{**given, "extrapolate": 1.25, **change})


def test_centred_advantages_refused() -> None:
    with pytest.raises(ValueError, match=pattern("mask is [3] but advantages is [2, 3]")):
        loss.centred_advantages(zeros(2, 3), ones(3))
    with pytest.raises(TypeError, match=pattern("sequence_ids is torch.float32; expected integers")):
        loss.centred_advantages(zeros(2, 3), sequence_ids=ones(2, 3))
    with pytest.raises(ValueError, match=pattern("mask holds a weight that is negative")):
        loss.centred_advantages(zeros(2, 3), -ones(2, 3))
    with pytest.raises(TypeError, match=pattern("advantages is torch.complex64; expected real numbers")):
        loss.centred_advantages(zeros(2, 3) * 1j)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_token_dtypes(dtype: torch.dtype) -> None:
    expected = fused("linear_logprobs", P)
    assert torch.equal(fused("linear_logprobs", P, tokens=P.tokens.to(dtype)), expected)


def test_ignore_index_is_an_argument() -> None:
    """0 pads in some tokenizers; −100 is then an id like any other that does not exist."""
    tokens = torch.tensor([[0, 1, 2], [3, 0, 4]])
    logprobs = fused("linear_logprobs", P, tokens=tokens, ignore_index=0)
    assert ((logprobs == 0) == (tokens == 0)).all()
    with pytest.raises(ValueError, match="the id -100, outside the vocabulary"):
        fused("linear_logprobs", P, tokens=tokens - 100, ignore_index=0)
