"""Lists of the student's likeliest tokens, scored by the teacher: steps by hand, costs, processes, servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import bucket, listed
from launches import give_samples, together
from run_cases import WORDS, Run, check_moments, check_same, completion_logprobs, run
from run_settings import arguments, distillation
from server_cases import served
from stub_server import serving
from transformers import AutoModelForCausalLM

from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.models.sizes.flops import cost_of, scoring_flops

K = 5
TOP_K: dict[str, object] = {"loss__objective": "top_k", "loss__top_k": K}


def by_hand(done: Run, folder: Path, temperature: float, of: str) -> None:
    """A run of one step against the same step with all the logits."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    log_p, log_q = (
        torch.cat([completion_logprobs(model, sample, temperature, WORDS) for sample in done.samples])
        for model in (student, teacher)
    )
    values = bucket(log_p, log_q.detach(), listed(log_p, log_q, K, of))
    values.mean().backward()
    (row,) = done.metrics
    assert row["loss"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert row["policy/top_k_kl_mean"] == pytest.approx(row["loss"], rel=1e-4)
    check_moments(done.folder, student)


CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "student": ("student", "models", {}),
    "both, in batches": ("both", "models", {"batch__max_tokens": 40, "sampling__temperature": 0.7}),
    "both, packed": ("both", "models", {"batch__layout": "packed"}),
    "student, padded heads": ("student", "padded", {}),
    "both, padded heads": ("both", "padded", {"sampling__temperature": 1.3}),
}


SLOW = ("student", "both, packed", "student, padded heads")


@pytest.mark.parametrize(
    ("of", "which", "options"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, case in CASES.items()],
)
def test_a_step_equals_the_same_step_by_hand(
    tmp_path: Path, of: str, which: str, options: dict[str, object], request: pytest.FixtureRequest
) -> None:
    used: Path = request.getfixturevalue(which)
    options = {**TOP_K, "loss__top_k_of": of, "optim__steps": 1, "optim__max_grad_norm": "null", **options}
    done = run(tmp_path / "run", used, **options)
    by_hand(done, used, float(str(options.get("sampling__temperature", 1.0))), of)
    assert all("student_top_k" not in sample for sample in done.samples)


def test_the_forward_pass_is_counted(tmp_path: Path, models: Path) -> None:
    rows = {
        of: run(tmp_path / of, models, optim__steps=1, **TOP_K, loss__top_k_of=of)
        for of in ("teacher", "student", "both")
    }
    cost = cost_of(AutoModelForCausalLM.from_pretrained(models / "student"))
    samples = []
    for sample in rows["teacher"].samples:
        prompt = sample["loss_mask"].index(True)
        samples.append(make_sample(sample["ids"][:prompt], sample["ids"][prompt:], 0))
    flops = {of: done.metrics[0]["flops/student"] for of, done in rows.items()}
    assert flops["student"] == flops["both"] == pytest.approx(flops["teacher"] + scoring_flops(cost, samples))
    assert "time/student_top_k" not in rows["teacher"].metrics[0]
    assert rows["student"].metrics[0]["time/student_top_k"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_do_what_one_does(tmp_path: Path, models: Path, fsdp: bool) -> None:
    """One process has a batch more than the other, which is given a filler. Beside it, test_sampled_tail.py."""
    found = {}
    for count in (1, 2):
        options: dict[str, Any] = {"optim__steps": 2, "sampling__prompts_per_step": 5, "batch__max_tokens": 40}
        settings = distillation(tmp_path / f"{count}", models, **TOP_K, loss__top_k_of="both", **options)
        codes, said = together(
            arguments("distill", settings),
            tmp_path / "said",
            count=count,
            fsdp=fsdp and count > 1,
            before=dict.fromkeys(range(count), give_samples),
        )
        assert codes == [0] * count, "\n".join(said)
        found[count] = tmp_path / f"{count}"
    check_same(found[2], found[1])


@pytest.mark.parametrize("of", ["student", pytest.param("both", marks=pytest.mark.slow)])
def test_a_server_that_scores_lists_equals_the_model_here(tmp_path: Path, models: Path, of: str) -> None:
    options: dict[str, Any] = {**TOP_K, "loss__top_k_of": of, "optim__steps": 2}
    here = run(tmp_path / "here", models, **options)
    with serving(models / "teacher") as stub:
        stub.scores_lists = True
        there = run(tmp_path / "there", models, **options, **served("teacher", stub))
    for a, b in zip(there.metrics, here.metrics, strict=True):
        for name in ("policy/top_k_kl_mean", "optim/grad_norm", "loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)
        assert a["teacher_kl"] == pytest.approx(b["teacher_kl"], abs=1e-4)
