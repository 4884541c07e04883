"""Lists with a tail that the sampled tokens stand for: steps by hand, the baseline, tokens that stand for nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from by_hand import bucket, listed, rest
from hypothesis import given
from hypothesis import strategies as st
from launches import give_samples, together
from property_settings import PROPERTY
from run_cases import WORDS, Run, check_moments, check_same, completion_logprobs, counted, run
from run_settings import arguments, distillation
from server_cases import served
from stub_server import serving
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl.trainer.objectives.sampled_tail import MEMORY, RunningMean

K = 3
TAIL: dict[str, object] = {"loss__objective": "top_k", "loss__top_k": K, "loss__top_k_tail": "sampled"}
NODS: dict[str, object] = {"environment__name": "class:nods.Nods", "environment__trust": "true"}
STILL: dict[str, object] = {"optim__lr": 1e-9, "optim__schedule": "constant", "optim__max_grad_norm": "null"}


class Step(NamedTuple):
    """A step by hand, of all its tokens."""

    loss: Tensor  # as the trainer says it, with the gradient that it has
    gaps: list[float]  # of the tokens outside
    drawn: int  # tokens that the student sampled
    mass: float  # of the student on the lists, on average


def step_by_hand(
    samples: list[dict[str, Any]], student: Any, teacher: Any, baseline: float, options: dict[str, object]
) -> Step:
    """With all the logits, over the ids that both know."""
    temperature, of = (
        float(str(options.get("sampling__temperature", 1.0))),
        str(options.get("loss__top_k_of", "teacher")),
    )
    weight, cap = float(str(options.get("loss__tail_weight", 1.0))), options.get("loss__truncate_ratio")
    log_p, log_q = (
        torch.cat([completion_logprobs(model, sample, temperature, WORDS) for sample in samples])
        for model in (student, teacher)
    )
    log_q = log_q.detach()
    tokens, sampler = (
        torch.tensor([value for sample in samples for value in counted(sample, field)])
        for field in ("ids", "sampler_logprobs")
    )
    own = torch.tensor([not sample["given"] for sample in samples for _ in counted(sample, "ids")])
    chosen = listed(log_p, log_q, K, of)
    rest_p, rest_q = rest(log_p, chosen), rest(log_q, chosen)
    rho = (rest_p / rest_q).log()

    safe = tokens.clamp(max=WORDS - 1)[:, None]
    outside = own & (tokens < WORDS) & ~chosen.gather(1, safe)[:, 0]
    log_py, log_qy = (logprobs.gather(1, safe)[:, 0] for logprobs in (log_p, log_q))
    ratio, gap = (log_py - sampler).exp().detach(), (log_py - log_qy - rho).detach()
    ratio = ratio if cap is None else ratio.clamp(max=float(str(cap)))
    ratio = ratio * (log_py - log_py.detach()).exp()  # a cap leaves the gradient of log p
    c = torch.where(own, baseline, 0.0)
    sampled = ratio * torch.where(outside, gap - c, 0.0)
    loss = (bucket(log_p, log_q, chosen) + weight * (sampled + c * rest_p)).mean()
    return Step(loss, gap[outside].tolist(), int(own.sum()), float(1 - rest_p.mean()))


def check_run(done: Run, folder: Path, options: dict[str, object]) -> None:
    """All steps of a run whose student does not move."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    total = weight = 0.0
    averaged: Any = 0.0
    for row in done.metrics:
        samples = [sample for sample in done.samples if sample["step"] == row["step"]]
        baseline = total / weight if weight else 0.0
        wanted = step_by_hand(samples, student, teacher, baseline, options)
        assert row["policy/tail_baseline"] == pytest.approx(baseline, rel=1e-4, abs=1e-9)
        assert row["policy/tail_share"] == pytest.approx(len(wanted.gaps) / wanted.drawn)
        assert row["policy/tail_gap"] == pytest.approx(sum(wanted.gaps) / len(wanted.gaps), rel=1e-4)
        assert row["policy/list_mass"] == pytest.approx(wanted.mass, rel=1e-4)
        assert row["loss"] == pytest.approx(wanted.loss.item(), rel=2e-4)
        assert row["policy/top_k_kl_mean"] == pytest.approx(row["loss"], rel=1e-4)
        total, weight = 0.9 * total + sum(wanted.gaps), 0.9 * weight + len(wanted.gaps)
        averaged = 0.9 * averaged + wanted.loss  # Adam's mean of the gradients is 0.1 times this one's
    averaged.backward()
    check_moments(done.folder, student)


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("models", {}),
    "batches, temperature": ("models", {"batch__max_tokens": 40, "sampling__temperature": 0.7}),
    "weight, list of both": ("models", {"loss__tail_weight": 0.4, "loss__top_k_of": "both"}),
    "another sampler, packed": ("models", {"sampling__dtype": "bfloat16", "batch__layout": "packed"}),
    "capped ratios": ("models", {"sampling__dtype": "bfloat16", "loss__truncate_ratio": 0.999}),
    "padded heads": ("padded", {"sampling__temperature": 1.3}),
    "padded heads, student's list": ("padded", {"loss__top_k_of": "student"}),
    "turns": ("models", NODS | {"sampling__max_new_tokens": 24}),
    "given": ("models", {"sampling__on_policy_fraction": 0.5}),
}


SLOW = ("plain", "another sampler, packed", "padded heads, student's list")


@pytest.mark.parametrize(
    ("which", "options"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, case in CASES.items()],
)
def test_the_steps_of_a_run_equal_those_by_hand(
    tmp_path: Path, which: str, options: dict[str, object], request: pytest.FixtureRequest
) -> None:
    used: Path = request.getfixturevalue(which)
    done = run(tmp_path / "run", used, **TAIL, **STILL, optim__steps=3, **options)
    check_run(done, used, options)
    assert all("tail_gaps" not in sample for sample in done.samples)
    replied = [False in sample["loss_mask"][-sample["completion_length"] :] for sample in done.samples]
    assert any(replied) == ("environment__name" in options)
    (*_, row) = done.metrics
    assert ("sampler_mismatch/mean_abs" in row) == (which == "models")
    if "truncate_ratio" in str(options):
        assert 0 < row["policy/clip_fraction"] <= row["policy/tail_share"]
    if options.get("sampling__dtype") is None and which == "models":
        assert row["policy/ratio_min"] == pytest.approx(1, abs=1e-3)
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-3)


def test_a_weight_of_0_is_the_bucket(tmp_path: Path, models: Path) -> None:
    rows = [
        run(tmp_path / tail, models, loss__objective="top_k", loss__top_k=K, loss__top_k_tail=tail, **options).metrics
        for tail, options in (("bucket", {}), ("sampled", {"loss__tail_weight": 0}))
    ]
    for plain, sampled in zip(*rows, strict=True):
        for name in ("loss", "optim/grad_norm", "teacher_kl", "policy/top_k_kl_mean"):
            assert sampled[name] == pytest.approx(plain[name], rel=1e-5)
        assert sampled["policy/bucket_kl"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
def test_two_processes_do_what_one_does(tmp_path: Path, models: Path, fsdp: bool) -> None:
    """The baseline too: it is the same number on both, however the tokens are spread. One of them is given a filler."""
    found = []
    for count in (1, 2):
        options: dict[str, Any] = {"optim__substeps": 2, "sampling__prompts_per_step": 5, "batch__max_tokens": 40}
        options |= {"loss__top_k_of": "both", "optim__steps": 2}
        settings = distillation(tmp_path / f"{count}", models, **TAIL, **options)
        first = dict.fromkeys(range(count), give_samples)
        codes, said = together(
            arguments("distill", settings), tmp_path / "said", count=count, fsdp=fsdp and count > 1, before=first
        )
        assert codes == [0] * count, "\n".join(said)
        found.append(tmp_path / f"{count}")
    check_same(found[1], found[0])
    assert Run.of(found[1]).metrics[-1]["policy/tail_baseline"] != 0


@pytest.mark.parametrize("api", ["prompt_logprobs", pytest.param("echo", marks=pytest.mark.slow)])
def test_a_served_teacher_equals_the_local_one(tmp_path: Path, models: Path, api: str) -> None:
    here = run(tmp_path / "here", models, optim__steps=2, **TAIL)
    with serving(models / "teacher") as stub:
        there = run(tmp_path / "there", models, optim__steps=2, **TAIL, **served("teacher", stub, api=api))
        assert not any("token_ids" in body for body in stub.bodies)  # nothing is asked that a bucket would not ask
    for a, b in zip(there.metrics, here.metrics, strict=True):
        for name in ("loss", "optim/grad_norm", "policy/tail_gap", "policy/tail_baseline", "policy/tail_share"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_a_served_teacher_of_a_padded_student(tmp_path: Path, padded: Path) -> None:
    """Ids beyond the tokenizer have no log-prob there: they stand for nothing."""
    with serving(padded / "teacher") as stub:
        done = run(tmp_path / "run", padded, **TAIL, **STILL, optim__steps=2, **served("teacher", stub))
    assert any(token >= WORDS for sample in done.samples for token in counted(sample, "ids"))
    assert all(math.isfinite(row["loss"]) and abs(row["policy/tail_gap"]) < 30 for row in done.metrics)


@PROPERTY
@given(steps=st.lists(st.lists(st.floats(-50, 50), max_size=6), max_size=5), data=st.data())
def test_the_running_mean_does_not_depend_on_the_order_in_a_step(steps: list[list[float]], data: st.DataObject) -> None:
    mean, other = RunningMean(), RunningMean()
    assert mean.value == 0
    for numbers in steps:
        mean.add(numbers)
        other.add(data.draw(st.permutations([*numbers, math.nan, math.inf])))
        assert mean.value == other.value
        again = RunningMean()
        again.load_state_dict(mean.state_dict())
        other, mean = again, other
    weights = [MEMORY ** (len(steps) - 1 - step) for step, numbers in enumerate(steps) for _ in numbers]
    numbers = [number for step in steps for number in step]
    wanted = sum(w * x for w, x in zip(weights, numbers, strict=True)) / sum(weights) if weights else 0.0
    assert mean.value == pytest.approx(wanted, abs=1e-9)
