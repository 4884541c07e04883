"""A failed sample's teacher reads a sample that succeeded: which one, what the loss leaves out, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from context_cases import GRADED, SIBLING, as_read, prompts_of
from hypothesis import given
from hypothesis import strategies as st
from run_cases import Run, check_moments, completion_logprobs, counted, distilled, refusal, run, token_logprobs
from run_settings import arguments, config, distillation
from server_cases import served
from stub_server import serving
from tiny_models import tokenizer
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer.config.context import SiblingConfig
from fastkl.trainer.data.chat import chat_template
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.teachers.context.attempts import Attempt, Told
from fastkl.trainer.teachers.context.siblings import Siblings

SETTINGS = GRADED | SIBLING
SAYS: dict[str, object] = {"environment__name": "class:nods.Says", "environment__trust": "true"}


def told_of(attempts: list[Attempt], **options: Any) -> list[Told]:
    chat = chat_template("here", tokenizer(), {})
    row = Prompt(prompt=[{"role": "system", "content": "sum"}, {"role": "user", "content": "{1}"}], source="here")
    settings = {"template": "{prompt}{solution}{feedback}?", "solution": " so:{text}", "feedback": " no:{text}"}
    return Siblings(SiblingConfig(**settings | options), "teacher.context").of_attempts(
        EncodedPrompt(row, [1], chat=chat), attempts
    )


def asked(told: Told) -> str | None:
    if told.content is None:
        return None
    assert isinstance(told.content, list)
    assert told.content[0] == {"role": "system", "content": "sum"}
    return str(told.content[1]["content"])


RIGHT, WRONG, ODD = Attempt("{a}", 1.0, False), Attempt("b", 0.0, False), Attempt("c", None, False)
SAID = Attempt("d", 0.5, True, "off by {1}\n")
SHOWN: list[set[str] | None] = [{"masked"}, {"sibling"}]
CASES: dict[str, tuple[list[Attempt], dict[str, Any], list[str | None], list[set[str] | None]]] = {
    "masked": ([WRONG, RIGHT], {}, ["{1} so:{a}?", None], [{"sibling"}, {"masked"}]),
    "plain": ([WRONG, RIGHT], {"succeeded": "plain"}, ["{1} so:{a}?", None], [{"sibling"}, set()]),
    "the-first": (
        [RIGHT, WRONG, Attempt("z", 2.0, False)],
        {"succeeded": "sibling"},
        ["{1} so:z?", "{1} so:{a}?", "{1} so:{a}?"],
        [{"sibling"}] * 3,
    ),
    "alone": ([WRONG, WRONG], {}, [None, None], [{"fallback"}] * 2),
    "alone-masked": ([WRONG, WRONG], {"alone": "mask"}, [None, None], [{"masked"}] * 2),
    "a-single-success": ([RIGHT, ODD], {"succeeded": "sibling"}, [None, None], [{"fallback"}, None]),
    "feedback": ([SAID, WRONG], {}, ["{1} no:off by {1}?", None], [{"feedback"}, {"fallback"}]),
    "both": ([RIGHT, SAID], {}, [None, "{1} so:{a} no:off by {1}?"], [{"masked"}, {"sibling", "feedback"}]),
    "no-feedback": ([RIGHT, SAID], {"feedback": None}, [None, "{1} so:{a}?"], [{"masked"}, {"sibling"}]),
    "thoughts": ([Attempt("<think>a</think>\nb", 1.0, False), WRONG], {}, [None, "{1} so:<think>a</think>\nb?"], SHOWN),
    "no-thoughts": ([Attempt("a</think>\nb", 1.0, False), WRONG], {"thoughts": False}, [None, "{1} so:b?"], SHOWN),
    "a-lower-bar": ([SAID, WRONG], {"success": 0.5}, [None, "{1} so:d?"], [{"masked"}, {"sibling"}]),
    "not-graded": ([ODD, ODD], {}, [None, None], [None, None]),
}


@pytest.mark.parametrize(("attempts", "options", "texts", "marks"), CASES.values(), ids=CASES)
def test_what_the_teacher_of_each_sample_reads(
    attempts: list[Attempt], options: dict[str, Any], texts: list[str | None], marks: list[set[str] | None]
) -> None:
    told = told_of(attempts, **options)
    assert [asked(each) for each in told] == texts
    assert [each.marks for each in told] == marks
    assert [each.masked for each in told] == ["masked" in (each or ()) for each in marks]


@given(
    rewards=st.lists(st.sampled_from([None, 0.0, 0.5, 1.0, 2.0]), max_size=6),
    succeeded=st.sampled_from(["mask", "plain", "sibling"]),
    alone=st.sampled_from(["plain", "mask"]),
)
def test_nobody_reads_itself_or_a_failure(rewards: list[float | None], succeeded: str, alone: str) -> None:
    attempts = [Attempt(str(place), reward, False) for place, reward in enumerate(rewards)]
    right = [place for place, reward in enumerate(rewards) if reward is not None and reward >= 1]
    for place, told in enumerate(told_of(attempts, succeeded=succeeded, alone=alone)):
        text, others = asked(told), [other for other in right if other != place]
        reads = rewards[place] is not None and bool(others) and (place not in right or succeeded == "sibling")
        assert text == (f"{{1}} so:{others[0]}?" if reads else None)
        assert (told.marks is None) == (rewards[place] is None)
        assert len(told.marks or ()) <= 1  # without feedback, one thing or nothing


def groups(done: Run) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for sample in done.samples:
        found.setdefault((sample["step"], sample["prompt_index"]), []).append(sample)
    return found


def written(sample: dict[str, Any]) -> str:
    return str(tokenizer().decode(sample["ids"][-sample["completion_length"] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("objective", ["policy_gradient", "top_k", "reverse_kl"])
@pytest.mark.parametrize("kind", ["path", "live", "ema"])
def test_runs(folder: Path, tmp_path: Path, kind: str, objective: str) -> None:
    """The teacher's scores follow what it read, and the shares are those of the step's samples."""
    teacher: dict[str, object] = {} if kind == "path" else {"teacher__self": kind, "teacher__path": ""}
    teacher |= {"teacher__ema_rate": 0.1} if kind == "ema" else {}
    options = SETTINGS | teacher | {"teacher__context__sibling__succeeded": "plain", "reward__coef": 0}
    done = run(tmp_path / "run", folder, **options, loss__objective=objective, optim__steps=1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / ("teacher" if kind == "path" else "student"))
    reads, alone = 0, 0
    for group in groups(done).values():
        assert len(group) == 3
        right = next((sample for sample in group if sample["reward"] == 1), None)
        for sample in group:
            begin = len(sample["ids"]) - sample["completion_length"]
            question = tokenizer().decode(sample["ids"][1 : begin - 1])
            told = right is not None and sample["reward"] == 0
            assert sample.get("teacher_text") == (f"<u>{question}={written(right)}<a>" if told and right else None)
            wanted = token_logprobs(model, as_read(sample)).tolist()
            assert counted(sample, "teacher_logprobs") == pytest.approx(wanted, abs=1e-5)
            reads, alone = reads + told, alone + (right is None)
    (row,) = done.metrics
    assert 0 < reads < len(done.samples)
    assert row["context/sibling_fraction"] == pytest.approx(reads / len(done.samples))
    assert row["context/fallback_fraction"] == pytest.approx(alone / len(done.samples))
    assert row["context/masked_fraction"] == row["context/feedback_fraction"] == row["context/too_long_fraction"] == 0
    assert row["context/plain_fraction"] == pytest.approx(1 - reads / len(done.samples))
    assert row["reward/mean"] == pytest.approx(sum(s["reward"] for s in done.samples) / len(done.samples))


@pytest.mark.parametrize("substeps", [1, 2])
def test_what_is_masked_is_not_there(folder: Path, tmp_path: Path, substeps: int) -> None:
    """The loss is the mean over the tokens of failed samples: reverse KL by hand, and Adam's means of its gradient."""
    options = SETTINGS | {"loss__objective": "reverse_kl", "optim__steps": 1, "optim__substeps": substeps}
    options |= {"optim__max_grad_norm": "null"}
    done = run(tmp_path / "run", folder, **options)
    (row,) = done.metrics
    assert all(sample["reward"] == 0 for sample in done.samples)
    assert (
        row["context/masked_fraction"] == pytest.approx(row["reward/mean"]) == pytest.approx(1 - len(done.samples) / 18)
    )
    if substeps > 1:
        return
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    values = []
    for sample in done.samples:
        p, q = completion_logprobs(student, sample), completion_logprobs(teacher, as_read(sample)).detach()
        values.append((p.exp() * (p - q)).sum(-1))
    torch.cat(values).mean().backward()
    assert row["loss"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    assert row["flops/teacher"] > 0
    check_moments(done.folder, student)


def test_a_step_of_which_all_is_masked_changes_nothing(folder: Path, tmp_path: Path) -> None:
    options = SETTINGS | {"reward__grader": "regex:a?", "reward__coef": 0, "optim__steps": 1, "optim__weight_decay": 0}
    done = run(tmp_path / "run", folder, **options)
    before = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert done.metrics[0]["context/masked_fraction"] == 1
    assert done.samples == []
    assert all(torch.equal(value, done.weights()[name]) for name, value in before.named_parameters())


def test_a_server_reads_what_a_model_here_reads(folder: Path, tmp_path: Path) -> None:
    options = SETTINGS | {"optim__steps": 1, "reward__coef": 0, "teacher__context__max_tokens": 20}
    here = run(tmp_path / "here", folder, **options)
    with serving(folder / "teacher") as stub:
        there = run(tmp_path / "there", folder, **options, **served("teacher", stub))
    assert any(sample["teacher_prompt"] for sample in there.samples)
    for ours, theirs in zip(there.samples, here.samples, strict=True):
        assert ours["teacher_prompt"] == theirs["teacher_prompt"]
        assert ours["teacher_logprobs"] == pytest.approx(theirs["teacher_logprobs"], abs=1e-4)


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_what_an_environment_says(folder: Path, tmp_path: Path, per_prompt: int) -> None:
    """The teacher reads it and the student does not; without siblings it is enough."""
    options = SETTINGS | SAYS | {"reward__grader": "environment", "reward__coef": 0, "optim__steps": 1}
    done = run(tmp_path / "run", folder, **options | {"sampling__samples_per_prompt": per_prompt})
    (row,) = done.metrics
    assert row["context/feedback_fraction"] > 0
    assert (row["context/sibling_fraction"] > 0) == (per_prompt > 1)
    told = [sample for sample in done.samples if not sample["truncated"]]
    assert all(sample["feedback"] is None for sample in done.samples if sample["truncated"])
    for sample in told:
        assert sample["feedback"] == "bad\nend"
        assert sample["teacher_text"].endswith(" -bad<unk>end<a>")


def test_rewards_may_count_too(folder: Path, tmp_path: Path) -> None:
    """Where successes stay in the loss: a reward's advantage and the teacher's are added."""
    options = SETTINGS | {"teacher__context__sibling__succeeded": "plain", "optim__steps": 1}
    done = run(tmp_path / "run", folder, **options)
    for sample in done.samples:
        gaps = zip(counted(sample, "teacher_logprobs"), counted(sample, "sampler_logprobs"), strict=True)
        wanted = [sample["reward_advantage"] + theirs - ours for theirs, ours in gaps]
        assert counted(sample, "advantages") == pytest.approx(wanted, abs=1e-5)
    assert {sample["reward"] for sample in done.samples} == {0.0, 1.0}


def test_an_entry_of_a_mixture(folder: Path, tmp_path: Path) -> None:
    """Shares are those of its own samples; the others stay."""
    data, path = {"path": str(folder / "sums.jsonl")}, str(folder / "teacher")
    context = {"function": "sibling", "sibling": {"template": "{prompt}{solution}", "solution": "={text}"}}
    entries = {"a": {"data": data, "teacher": {"path": path, "context": context}}, "b": {"data": data}}
    settings = distillation(tmp_path / "run", folder, **GRADED, data__path="null", optim__steps=1, reward__coef=0)
    done = Run.of(distilled(settings | {"mixture": json.dumps(entries)}))
    names = [sample["dataset"] for sample in done.samples]
    assert names.count("b") == 9
    assert names.count("a") == round(9 * (1 - done.metrics[0]["context/masked_fraction"]))
    assert all(sample["teacher_prompt"] is None for sample in done.samples if sample["dataset"] == "b")


LEAVES = {"teacher.context.sibling.succeeded": "plain"}
WANTED: dict[str, tuple[dict[str, object], list[str]]] = {
    "unknown": (
        {"teacher.context.function": "siblings"},
        ["teacher.context.function is 'siblings'", "known are sibling and MODULE.NAME"],
    ),
    "trust": ({"teacher.context.trust_context": "true"}, ["teacher.context.trust_context is True", "no code of yours"]),
    "other": (
        {"teacher.context.function": "a.b"},
        ["teacher.context.sibling.template is", "'a.b'; set it to sibling"],
    ),
    "name": (
        {"teacher.context.sibling.template": "{prompt}{answer}{solution}"},
        ["teacher.context.sibling.template has {answer}", "{prompt} and {solution} and {feedback}"],
    ),
    "no-name": (
        {"teacher.context.sibling.template": "{prompt}"},
        ["teacher.context.sibling.template is '{prompt}', without {solution}"],
    ),
    "no-text": ({"teacher.context.sibling.solution": "x"}, ["teacher.context.sibling.solution is 'x', without {text}"]),
    "no-success": ({"teacher.context.sibling.success": "nan"}, ["teacher.context.sibling.success is nan"]),
    "no-grades": (
        {"reward.grader": "null", "reward.coef": 1},
        ["teacher.context.function is sibling", "reward.grader is null"],
    ),
    "no-siblings": ({"sampling.samples_per_prompt": 1}, ["sampling.samples_per_prompt is 1", "has no siblings"]),
    "portions": ({"sampling.tokens_per_step": 4}, ["sampling.tokens_per_step is 4", "end in different steps"]),
    "rewards": ({"reward.coef": 0.5}, ["sibling.succeeded is mask", "reward.coef is 0.5", "reward.coef to 0"]),
    "normalized": ({"reward.normalize": "true"}, ["reward.normalize is True", "reward.coef is 0"]),
    "nothing": ({"loss.kl_coef": 0}, ["loss.kl_coef is 0 and reward.coef is 0", "nothing to learn"]),
    "weighed": (LEAVES | {"loss.redistribute": 0.5}, ["loss.redistribute is 0.5", "reward.coef is 0"]),
    "not-read": ({"teacher.context.function": "null"}, ["reward.coef is 0", "no teacher.context has a function"]),
    "no-advantages": (
        {"loss.objective": "reverse_kl", "reward.coef": 0.5},
        ["reward.coef is 0.5", "no advantages"],
    ),
}


@pytest.mark.parametrize(("options", "parts"), WANTED.values(), ids=WANTED)
def test_refused_settings(tmp_path: Path, options: dict[str, object], parts: list[str]) -> None:
    settings = distillation(tmp_path / "run", tmp_path, **SETTINGS, reward__coef=0)
    if options.get("teacher.context.function") == "null":
        settings = {name: value for name, value in settings.items() if ".sibling." not in name}
    with pytest.raises(ConfigError) as error:
        config("distill", settings | options)
    assert [part for part in parts if part not in str(error.value)] == [], error.value


def test_prompts_that_are_texts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The solution stands before the prompt; another template is refused before a model is loaded."""
    texts: dict[str, object] = {"data__chat_template": "false", "reward__coef": 0, "optim__steps": 1}
    settings = distillation(tmp_path / "run", folder, **SETTINGS | texts)
    refusal(capsys, "distill", settings, "sums.jsonl:1: the student's prompt ends in", "teacher.context.sibling")
    template = {"teacher__context__sibling__template": "{solution}{feedback} {prompt}"}
    done = run(tmp_path / "run", folder, **SETTINGS | texts | template)
    assert any(sample["teacher_prompt"] for sample in done.samples)


def test_a_success_that_is_too_long(folder: Path, tmp_path: Path) -> None:
    options = SETTINGS | {"teacher__context__max_tokens": 5, "reward__coef": 0, "optim__steps": 1}
    done = run(tmp_path / "run", folder, **options)
    assert done.metrics[0]["context/too_long_fraction"] == done.metrics[0]["context/sibling_fraction"] > 0
    assert all(sample["teacher_prompt"] is None for sample in done.samples)


def test_where_there_are_no_samples(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, object] = {"model.path": folder / "teacher", "data.path": folder / "sums.jsonl"}
    settings |= {"output": tmp_path / "scores.jsonl", "model.context.function": "sibling"}
    refusal(capsys, "score", settings, "model.context.function is 'sibling'", "there are no samples here")
    dry = distillation(tmp_path / "run", folder, **SETTINGS, reward__coef=0)
    assert cli.main([*arguments("distill", dry), "--dry-run"]) == 0
    assert "sibling writes in each step" in capsys.readouterr().out


def test_rows_give_no_prompts_before_the_first_step(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}]
    context = {"function": "sibling", "sibling.template": "{prompt}{solution}"}
    more: dict[str, object] = {"reward.grader": "last_number", "reward.coef": 0, "sampling.samples_per_prompt": 2}
    found, read = prompts_of(tmp_path, rows, context, more=more)
    assert found == ["<u>1+1=<a>"]
    assert read.give([]) == ([], {})
