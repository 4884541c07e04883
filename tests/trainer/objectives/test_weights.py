"""`loss.weights`: each rule by its formula, a weighted step by hand, and what a function of the user's may give."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from by_hand import bucket, kl, listed
from groups import in_group
from hypothesis import example, given
from hypothesis import strategies as st
from run_cases import Run, check_moments, completion_logprobs, counted, distilled, refusal, run
from run_settings import distillation
from server_cases import served
from stub_server import serving
from tiny_data import read_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl.loss import TopK
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.objectives.weights import rules, step
from fastkl.trainer.objectives.weights.known import KnownTokens, known_tokens, list_entropies
from fastkl.trainer.objectives.weights.step import TokenWeights

K = 5


def sample(gaps: Sequence[float], prompt: int = 2, **fields: object) -> Sample:
    """A prompt, and a completion whose tokens have these gaps; the last is context, as an environment's reply is."""
    count = len(gaps)
    nothing = [0.0] * prompt
    made = Sample([5] * (prompt + count + 1), [False] * prompt + [True] * count + [False], 0)
    made.sampler_logprobs = [*nothing, *[-1.0] * count, 0.0]
    made.teacher_logprobs = [*nothing, *(-1.0 - gap for gap in gaps), 0.0]
    made.completion_length = count + 1
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def weighed(samples: list[Sample], *rules: str) -> list[list[float]]:
    """The weights of the counted tokens."""
    TokenWeights(LossConfig(weights=list(rules))).set(samples)
    for one in samples:
        assert [weight for weight, counts in zip(one.weights, one.loss_mask, strict=True) if not counts] == [0.0] * 3
    return [[w for w, counts in zip(one.weights, one.loss_mask, strict=True) if counts] for one in samples]


def test_without_rules_nothing_is_weighed() -> None:
    one = sample([1.0, 2.0])
    assert TokenWeights(LossConfig()).set([one]) == {}
    assert (one.weights.tolist(), one.weight, one.weighed_tokens) == ([], 2, 2)
    assert TokenWeights(LossConfig(weights=["drift:1"])).set([]) == {}


def test_the_first_tokens_are_skipped_once_in_a_completion() -> None:
    """A completion that goes on from an earlier step has had its first tokens."""
    samples = [sample([1.0] * 5), sample([1.0]), sample([1.0, 1.0], completion_length=7)]
    assert weighed(samples, "skip_first:3") == [[0, 0, 0, 1, 1], [0], [1, 1]]
    assert [one.weighed_tokens for one in samples] == [2, 0, 2]


def test_the_largest_gaps_of_the_step_are_chosen() -> None:
    samples = [sample([0.5, -3.0, 0.1]), sample([2.0, -0.5])]
    assert weighed(samples, "top_gap:0.4") == [[0, 1, 0], [1, 0]]
    assert weighed(samples, "top_gap:0.5") == [[1, 1, 0], [1, 0]]  # of equal ones the first
    assert weighed(samples, "top_gap:0.01") == [[0, 1, 0], [0, 0]]
    unscored = sample([1.0], teacher_logprobs=[])
    assert weighed([*samples, unscored], "top_gap:0.4") == [[0, 1, 0], [1, 0], [1]]


def test_drift_by_its_formula() -> None:
    assert weighed([sample([1.0, -2.0, 1.0])], "drift:0.5") == [pytest.approx([1.5, 1.375, 1.125])]
    assert weighed([sample([0.0, 0.0])], "drift:0.5") == [[1.5, 1.5]]
    assert weighed([sample([0.0, 0.0], sampler_logprobs=[])], "drift:0.5") == [[1, 1]]


def test_tip_by_its_formula() -> None:
    """Of three tokens h is 0, 1 and ½, δ is 1, 0 and ¼: the score is 1, 1 and ⅝; then a score of ⅝ is above ½."""
    first, second = sample([-5.0, 1.0]), sample([2.0])
    first.student_entropies, second.student_entropies = [0.0, 0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 2.0, 0.0]
    assert weighed([first, second], "tip:0.6") == [[1, 1], [0]]
    assert weighed([first, second], "tip:0.2") == [[1, 0], [0]]
    second.teacher_logprobs = second.sampler_logprobs  # δ is 0 now
    first.student_entropies = [0.0, 0.0, 1.0, 1.0, 0.0]
    assert weighed([first, second], "tip:0.3") == [[1, 0], [0]]
    assert weighed([first, second], "tip:0.6") == [[1, 0], [1]]
    unmeasured = sample([9.0], student_entropies=[])
    assert weighed([first, second, unmeasured], "tip:0.3") == [[1, 0], [0], [1]]
    assert weighed([unmeasured], "tip:0.3") == [[1]]
    flat = sample([1.0, 1.0], student_entropies=[0.0, 0.0, 2.0, 2.0, 0.0])
    assert weighed([flat], "tip:0.5") == [[1, 0]]


def test_the_highest_of_many_scores_are_cut_for_tip() -> None:
    """One outlier of a hundred does not make all others alike."""
    many = sample([*([1.0] * 50), *([3.0] * 49), 1e6], student_entropies=[0.0] * 103)
    assert sum(weighed([many], "tip:0.5")[0][50:]) == 50


@example([[0.0, 5.960464477539063e-08]], 0.5)
@example([[0.0, 0.9269577259946935, -14.189959745646815, -1.060076137072958, 1.0, 0.0]], 1.0)
@given(st.lists(st.lists(st.floats(-30, 1), min_size=1, max_size=6), min_size=1, max_size=5), st.floats(0.01, 1))
def test_what_holds_for_all_gaps(gaps: list[list[float]], share: float) -> None:
    samples = [sample(own) for own in gaps]
    chosen = weighed(samples, f"top_gap:{share}")
    count = sum(map(len, gaps))
    assert sum(map(sum, chosen)) == math.ceil(share * count)
    left, taken = ([abs(g) for own, w in zip(gaps, chosen, strict=True) for g, c in zip(own, w, strict=True) if c == kind]
                   for kind in (0, 1))  # fmt: skip
    assert not left or max(left) <= min(taken) + 1e-5  # the gap of two float32 log-probs
    drifted = weighed(samples, "drift:2")
    for own in drifted:
        assert own[0] == 3
        assert all(1 <= later <= earlier + 1e-12 for earlier, later in itertools.pairwise(own))
    both = weighed(samples, "drift:2", f"top_gap:{share}")
    assert both == [[a * b for a, b in zip(x, y, strict=True)] for x, y in zip(drifted, chosen, strict=True)]


def twice(samples: Sequence[KnownTokens]) -> list[Tensor]:
    return [2.0 * torch.ones(len(one.tokens)) for one in samples]


def test_what_a_list_says_of_the_teachers_entropy() -> None:
    """At most the truth, and the truth where the list is all; an id of −1 pads."""
    log_q = torch.log_softmax(torch.randn(3, 6, dtype=torch.float64), -1)
    entropies = -(log_q.exp() * log_q).sum(-1)
    whole = TopK(torch.arange(6).expand(3, 6), log_q)
    torch.testing.assert_close(list_entropies(whole), entropies)
    assert (list_entropies(TopK(*log_q.topk(2, -1)[::-1])) < entropies).all()
    padded = TopK(torch.tensor([[3, -1]]), torch.tensor([[-0.5, 7.0]]))
    rest = 1 - math.exp(-0.5)
    torch.testing.assert_close(list_entropies(padded).item(), entropy(rest))
    one = sample([1.0, 2.0])
    assert known_tokens(one).teacher_entropies is None
    one.teacher_top_k = TopK(torch.tensor([[1], [2]]), torch.tensor([[0.0], [-0.5]]))
    found = known_tokens(one).teacher_entropies
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([0.0, entropy(rest)], dtype=torch.float64))


def entropy(rest: float) -> float:
    return -rest * math.log(rest) - (1 - rest) * math.log(1 - rest)


GIVEN_BY_FUNCTIONS: dict[str, tuple[Callable[..., object], str | None]] = {
    "twice": (twice, None),
    "lists": (lambda samples: [[0.5] * len(one.tokens) for one in samples], None),
    "short": (
        lambda samples: [one.positions[1:] for one in samples],
        r"gave weights .* \[\[1\]\] for samples of \[2\]",
    ),
    "one": (lambda samples: 1.0, "gave a float, which is no list of numbers"),
    "negative": (lambda samples: [[1.0, -1.0] for _ in samples], r"gave the weight -1\.0; weights are finite"),
    "nan": (lambda samples: [[1.0, math.nan] for _ in samples], "gave the weight nan"),
    "none": (lambda samples: None, "gave a NoneType, which is no list of numbers"),
    "one_less": (lambda samples: [one.positions for one in samples[1:]], r"gave weights .* \[\] for samples of \[2\]"),
    "column": (lambda samples: [one.positions[:, None] for one in samples], r"gave weights .* \[\[2, 1\]\] for"),
    "failing": (lambda samples: samples[9], r"failed: IndexError: list index out of range"),
}


def user_function(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., object]) -> str:
    """The rule that names it."""
    module = types.ModuleType("own_weights")
    setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "own_weights", module)
    return f"function:own_weights.{name}"


@pytest.mark.parametrize("name", GIVEN_BY_FUNCTIONS)
def test_a_function_of_the_users_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, wrong = GIVEN_BY_FUNCTIONS[name]
    rule = user_function(monkeypatch, name, function)
    with pytest.raises(ConfigError, match=r"loss\.weights names .*; set loss\.trust_weights to true"):
        TokenWeights(LossConfig(weights=[rule]))
    weights, one = TokenWeights(LossConfig(weights=[rule, "skip_first:1"], trust_weights=True)), sample([1.0, 2.0])
    if wrong is not None:
        with pytest.raises(RunError, match=rf"loss\.weights: function:own_weights\.{name} {wrong}"):
            weights.set([one])
        return
    value = 2.0 if name == "twice" else 0.5
    assert weights.set([one]) == {"weights/mean": value / 2, "weights/selected_fraction": 0.5}
    assert one.weights.tolist() == [0, 0, 0, value, 0]


GAPS = ([1.0, 2.0, 0.5], [0.0, 3.0], [1.0], [2.0, 0.5, 0.5, 1.0])


def of_process(rank: int, count: int) -> list[Any]:
    """Weights and metrics by rules, of the samples that this process has; then how often records went to the first."""
    found: list[Any] = []
    for rules_given in (["skip_first:1", "drift:0.5"], ["top_gap:0.4", "drift:0.5"], ["drift:1e200", "drift:1e200"]):
        own = [sample(gaps, place=place) for place, gaps in enumerate(GAPS) if place % count == rank]
        with patch.object(step, "by_first", wraps=step.by_first) as sent:
            try:
                metrics = TokenWeights(LossConfig(weights=rules_given)).set(own)
            except RunError as error:
                found.append(str(error))
            else:
                found.append((metrics, {one.place: one.weights.tolist() for one in own}, sent.call_count))
    return found


def test_processes_weigh_as_one_does() -> None:
    """What goes by one sample at a time is weighed where the sample is."""
    two, (one,) = in_group(of_process), [of_process(0, 1)]
    for index, calls in ((0, 0), (1, 1)):
        for found in two:
            assert found[index][0] == pytest.approx(one[index][0], rel=1e-12)
            assert found[index][2] == calls
        assert two[0][index][1] | two[1][index][1] == one[index][1]
    assert [found[2] for found in two] == [one[2]] * 2
    assert "too large to add" in one[2]


def test_weights_that_no_number_can_add_up() -> None:
    weights = TokenWeights(LossConfig(weights=["drift:1e200", "drift:1e200"]))
    with pytest.raises(RunError, match=r"the weights of drift:1e\+200 and drift:1e\+200 together are too large to add"):
        weights.set([sample([1.0, 2.0])])


def test_what_is_nothing_beside_the_largest_weight_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token counts for the metrics if it does for the loss, which has it in float32."""
    one = sample([0.0, 1.0])
    rule = user_function(monkeypatch, "far_apart", lambda samples: [[1e-20, 1e20]])
    TokenWeights(LossConfig(weights=[rule], trust_weights=True)).set([one])
    assert (one.weights.tolist(), one.weighed_tokens) == ([0, 0, 0, 1e20, 0], 1)


def surrogate(log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    own, theirs = (logprobs.gather(1, tokens[:, None])[:, 0] for logprobs in (log_p, log_q))
    return (own - own.detach()).exp() * (own.detach() - theirs)


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "policy_gradient": surrogate,
    "top_k": lambda log_p, log_q, _: bucket(log_p, log_q, listed(log_p, log_q, K)),
    "reverse_kl": lambda log_p, log_q, _: kl(log_p, log_q),
}
OPTIONS: dict[str, dict[str, object]] = {name: {"loss__objective": name} for name in FORMULAS}
OPTIONS["top_k"] |= {"loss__top_k": K}


@pytest.mark.parametrize("rules", [["skip_first:2"], ["drift:0.5", "top_gap:0.6"]], ids=" ".join)
@pytest.mark.parametrize("objective", FORMULAS)
def test_a_weighted_step_by_hand(tmp_path: Path, models: Path, objective: str, rules: list[str]) -> None:
    """In several batches; what else is measured is of all tokens, or of those that count."""
    options: dict[str, object] = {"optim__steps": 1, "optim__max_grad_norm": "null", "batch__max_tokens": 40}
    done = run(tmp_path / "run", models, loss__weights=rules, **options, **OPTIONS[objective])
    (row,) = done.metrics
    student, teacher = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("student", "teacher"))
    log_p, log_q = ([completion_logprobs(model, s) for s in done.samples] for model in (student, teacher))
    tokens = [torch.tensor(counted(s, "ids")) for s in done.samples]
    values = torch.cat([FORMULAS[objective](p, q.detach(), t) for p, q, t in zip(log_p, log_q, tokens, strict=True)])
    weights = torch.tensor([weight for s in done.samples for weight in counted(s, "weights")])
    assert (weights == 0).any()
    ((values * weights).sum() / weights.sum()).backward()
    check_moments(done.folder, student)

    assert row["weights/mean"] == pytest.approx(weights.mean().item())
    assert row["weights/selected_fraction"] == pytest.approx((weights != 0).float().mean().item())
    gaps = torch.cat(
        [(p.detach() - q.detach()).gather(1, t[:, None])[:, 0] for p, q, t in zip(log_p, log_q, tokens, strict=True)]
    )
    assert row["teacher_kl"] == pytest.approx(gaps.mean().item(), rel=1e-4)
    assert row["sampler_mismatch/mean_abs"] < 1e-5
    name = {"policy_gradient": "k3", "top_k": "top_k_kl_mean", "reverse_kl": "reverse_kl_mean"}[objective]
    wanted = 0.0 if name == "k3" else values[weights != 0].mean().item()
    assert row[f"policy/{name}"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "recomputed"), [*((name, False) for name in FORMULAS), ("policy_gradient", True)]
)
def test_entropies_are_measured_before_the_update_and_counted(
    tmp_path: Path, models: Path, objective: str, recomputed: bool
) -> None:
    """The pass that recomputes log-probs gives them for nothing."""
    options: dict[str, object] = {"optim__steps": 1, "batch__max_tokens": 40, **OPTIONS[objective]}
    options |= {"loss__old_logprobs": "recompute"} if recomputed else {}
    done = run(tmp_path / "run", models, loss__weights=["tip:1"], **options)
    before = run(tmp_path / "before", models, **options)
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    for one in done.samples:
        log_p = completion_logprobs(student, one).detach()
        found = torch.tensor(counted(one, "student_entropies"))
        torch.testing.assert_close(found, -(log_p.exp() * log_p).sum(-1), atol=1e-4, rtol=1e-4)
    more = done.metrics[0]["flops/student"] - before.metrics[0]["flops/student"]
    assert (more > 0) != recomputed
    assert done.metrics[0]["loss"] == pytest.approx(before.metrics[0]["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Run:
    return run(tmp_path_factory.mktemp("run") / "plain", models, optim__steps=2, **OPTIONS["reverse_kl"])


def test_a_constant_weight_changes_nothing_and_is_counted(tmp_path: Path, models: Path, plain: Run) -> None:
    """`top_gap:1` is one, and asks the teacher before the update: a divergence's reads each sample twice then."""
    done = run(tmp_path / "run", models, optim__steps=2, loss__weights=["top_gap:1"], **OPTIONS["reverse_kl"])
    for now, before in zip(done.metrics, plain.metrics, strict=True):
        assert now["flops/teacher"] == 2 * before["flops/teacher"]
        assert now["flops/student"] == before["flops/student"]
        assert now["weights/mean"] == now["weights/selected_fraction"] == 1
        assert now["loss"] == pytest.approx(before["loss"], rel=1e-6)
    for name, parameter in plain.weights().items():
        torch.testing.assert_close(done.weights()[name], parameter)


@pytest.mark.parametrize(("objective", "size"), [("policy_gradient", 1e-60), ("top_k", 1e37), ("reverse_kl", 1e60)])
def test_weights_count_by_their_ratios_however_large(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, objective: str, size: float
) -> None:
    """Also where float32 has no such number."""
    options: dict[str, object] = {"optim__steps": 1, "batch__max_tokens": 40, **OPTIONS[objective]}
    wanted = run(tmp_path / "wanted", models, loss__weights=["drift:1"], **options).metrics[0]
    monkeypatch.setitem(rules.RULES, "drift", lambda samples, gamma: [size * w for w in rules.drift(samples, gamma)])
    found = run(tmp_path / "found", models, loss__weights=["drift:1"], **options).metrics[0]
    assert found["weights/mean"] == pytest.approx(size * wanted["weights/mean"])
    for name in (
        "loss",
        "optim/grad_norm",
        "policy/k3" if objective == "policy_gradient" else "sampler_mismatch/mean_abs",
    ):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name


def test_tokens_of_no_weight_cost_the_head_nothing_and_a_step_of_none_teaches_nothing(
    tmp_path: Path, models: Path, plain: Run
) -> None:
    done = run(tmp_path / "run", models, optim__steps=1, loss__weights=["skip_first:100"], **OPTIONS["reverse_kl"])
    (row,) = done.metrics
    assert (row["loss"], row["optim/grad_norm"], row["weights/selected_fraction"]) == (0, 0, 0)
    assert row["flops/student"] < plain.metrics[0]["flops/student"]
    assert row["flops/teacher"] == plain.metrics[0]["flops/teacher"]
    assert row["teacher_kl"] == pytest.approx(plain.metrics[0]["teacher_kl"], rel=1e-5)


TAU = {
    "policy_gradient": 1.45,
    "top_k": 1.45,
    "reverse_kl": 3.05,
}  # near the median of a list's, or of the vocabulary's
COEF = 0.5


@pytest.mark.parametrize("objective", FORMULAS)
def test_the_forward_kl_on_top_where_the_teacher_is_unsure(tmp_path: Path, models: Path, objective: str) -> None:
    """Of the listed tokens where no more is known, of the whole vocabulary elsewhere; weights act on both."""
    options: dict[str, object] = {"optim__steps": 1, "optim__max_grad_norm": "null", "batch__max_tokens": 40}
    options |= {
        "loss__forward_kl_above": TAU[objective],
        "loss__forward_kl_coef": COEF,
        "loss__weights": ["skip_first:2"],
    }
    if objective == "policy_gradient":
        options["loss__forward_kl_top_k"] = K
    done = run(tmp_path / "run", models, **options, **OPTIONS[objective])
    (row,) = done.metrics
    student, teacher = (AutoModelForCausalLM.from_pretrained(models / name) for name in ("student", "teacher"))
    log_p, log_q = (torch.cat([completion_logprobs(model, s) for s in done.samples]) for model in (student, teacher))
    log_q = log_q.detach()
    tokens = torch.tensor([token for s in done.samples for token in counted(s, "ids")])
    weights = torch.tensor([weight for s in done.samples for weight in counted(s, "weights")])
    if objective == "reverse_kl":
        outcomes, forward_kl = log_q.exp(), kl(log_q, log_p)
    else:
        q = log_q.topk(K, -1).values.exp()
        outcomes = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
        forward_kl = bucket(log_q, log_p, listed(log_p, log_q, K))
    entropies = -(outcomes * outcomes.log()).sum(-1)
    unsure = entropies > TAU[objective]
    assert 0 < (unsure & (weights > 0)).sum() < (weights > 0).sum()
    values = FORMULAS[objective](log_p, log_q, tokens) + COEF * unsure * forward_kl
    loss = (values * weights).sum() / weights.sum()
    loss.backward()
    check_moments(done.folder, student)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["policy/unsure_fraction"] == pytest.approx(unsure[weights > 0].float().mean().item(), rel=1e-5)
    assert row["policy/added_forward_kl"] == pytest.approx((unsure * forward_kl)[weights > 0].mean().item(), rel=1e-4)


def test_a_server_tells_enough_of_an_unsure_teacher(tmp_path: Path, models: Path) -> None:
    options: dict[str, object] = {"optim__steps": 1, "loss__forward_kl_above": 1.45, "loss__forward_kl_top_k": K}
    options["loss__weights"] = ["drift:0.5"]
    here = run(tmp_path / "here", models, **options).metrics[0]
    with serving(models / "teacher") as stub:
        there = run(tmp_path / "there", models, **options, **served("teacher", stub)).metrics[0]
    assert 0 < here["policy/unsure_fraction"] < 1
    for name in ("loss", "policy/unsure_fraction", "policy/added_forward_kl", "weights/mean", "optim/grad_norm"):
        assert there[name] == pytest.approx(here[name], rel=1e-3), name


def test_several_teachers_of_an_unsure_run_with_heads_of_their_own(tmp_path: Path, padded: Path) -> None:
    """Each sample's list is compared over the ids that its own teacher shares with the student."""
    data = {"path": str(padded / "sums.jsonl")}
    mixture = {
        "padded": {"data": data, "teacher": {"path": str(padded / "teacher")}},
        "own": {"data": data, "teacher": {"path": str(padded / "student")}},
    }
    settings = distillation(
        tmp_path / "run", padded, optim__steps=1, loss__forward_kl_above=0.5, loss__forward_kl_top_k=K
    )
    settings |= {"data.path": "null", "teacher.path": "", "mixture": json.dumps(mixture)}
    (row,) = read_jsonl(distilled(settings) / "metrics.jsonl")
    assert row["policy/added_forward_kl"] > 0
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"loss__forward_kl_above": 1, "loss__forward_kl_top_k": 999}, "loss.forward_kl_top_k is 999"),
        ({"loss__objective": "top_k", "loss__top_k": 999}, "loss.top_k is 999"),
    ],
)
def test_a_list_of_more_than_there_is(
    tmp_path: Path, models: Path, options: dict[str, object], setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal(capsys, "distill", distillation(tmp_path / "run", models, **options), setting, "ids of the tokenizer")
