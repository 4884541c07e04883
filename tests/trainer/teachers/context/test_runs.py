"""Distillations whose teacher has a prompt of its own, and `fastkl score` with one, end to end on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from context_cases import GRADED, HERE, SAMPLES, SIBLING, as_read
from run_cases import (
    Run,
    check_equal,
    check_same_weights,
    counted,
    distilled,
    interrupt,
    log,
    refusal,
    run,
    token_logprobs,
)
from run_settings import arguments, distillation
from server_cases import served
from stub_server import serving
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import save_model, tokenizer
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer.models import loading
from fastkl.trainer.runs.report.samples import page_samples

OBJECTIVES = ["policy_gradient", "reverse_kl", "top_k"]
SYSTEM: dict[str, object] = {"teacher__context__system": "in words"}
OWN = ("teacher_prompt", "teacher_text", "plain_logprobs")
SIBLINGS = SIBLING | GRADED | {"reward__coef": 0}


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_students_own_prompt_changes_no_bit(folder: Path, tmp_path: Path, objective: str) -> None:
    options = {"loss__objective": objective, "optim__steps": 2, "batch__max_tokens": 40}
    plain = distilled(distillation(tmp_path / "plain", folder, **options))
    own = distilled(distillation(tmp_path / "own", folder, **options, teacher__context__template="{prompt}"))
    assert without(log(own), "context/gap") == log(plain)
    assert [row["context/gap"] for row in log(own)] == pytest.approx([0, 0], abs=1e-6)
    ours, theirs = (read_jsonl(path / "samples.jsonl") for path in (own, plain))
    assert without(ours, *OWN) == without(theirs, *OWN)
    assert all(sample["teacher_prompt"] == sample["ids"][: -sample["completion_length"]] for sample in ours)
    check_same_weights(own, plain)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_teacher_reads_its_prompt_in_a_run(folder: Path, tmp_path: Path, objective: str) -> None:
    """In batches of all sizes; the report shows what it read, and what it would have said without."""
    done = run(tmp_path / "run", folder, **SYSTEM, loss__objective=objective, optim__steps=2, batch__max_tokens=30)
    teacher: Any = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    gaps: dict[int, list[float]] = {1: [], 2: []}
    for sample in done.samples:
        begin = len(sample["ids"]) - sample["completion_length"]
        assert sample["teacher_text"] == f"<s>in words{tokenizer().decode(sample['ids'][:begin])}"
        found, plain = counted(sample, "teacher_logprobs"), counted(sample, "plain_logprobs")
        assert found == pytest.approx(token_logprobs(teacher, as_read(sample)).tolist(), abs=1e-5)
        assert plain == pytest.approx(token_logprobs(teacher, sample).tolist(), abs=1e-5)
        assert found != pytest.approx(plain, abs=1e-2)
        gaps[sample["step"]] += [a - b for a, b in zip(found, plain, strict=True)]
    for row in done.metrics:
        gap = gaps[row["step"]]
        assert row["context/gap"] == pytest.approx(sum(gap) / len(gap), abs=1e-5)
    shown = page_samples(done.folder, 10**6)["shown"][0]
    assert shown["read"].startswith("<s>in words<u>")
    assert shown["read_tokens"] == len(done.samples[0]["teacher_prompt"])
    assert shown["plain"] == [round(value, 4) for value in counted(done.samples[0], "plain_logprobs")]


@pytest.mark.parametrize("objective", ["policy_gradient", "reverse_kl"])
@pytest.mark.parametrize("kind", [{"self": "live"}, {"self": "ema", "ema_rate": 0.1}], ids=["live", "ema"])
def test_a_student_teaches_itself_what_it_is_told(
    folder: Path, tmp_path: Path, kind: dict[str, object], objective: str
) -> None:
    """Without a reward: what it reads is all that it does not know."""
    options = {f"teacher__{name}": value for name, value in kind.items()} | {"teacher__path": "", "optim__steps": 1}
    done = run(tmp_path / "run", folder, **SYSTEM, **options, loss__objective=objective)
    student: Any = AutoModelForCausalLM.from_pretrained(folder / "student")
    for sample in done.samples:
        wanted = token_logprobs(student, as_read(sample)).tolist()
        assert counted(sample, "teacher_logprobs") == pytest.approx(wanted, abs=1e-5)
        assert counted(sample, "plain_logprobs") == pytest.approx(counted(sample, "sampler_logprobs"), abs=1e-4)
    assert done.metrics[0]["optim/grad_norm"] > 0.01


def test_a_server_reads_what_a_model_here_reads(folder: Path, tmp_path: Path) -> None:
    local = log(distilled(distillation(tmp_path / "local", folder, **SYSTEM, optim__steps=2)))
    with serving(folder / "teacher") as stub:
        options = {**SYSTEM, "optim__steps": 2, **served("teacher", stub)}
        there = distilled(distillation(tmp_path / "served", folder, **options))
    wanted = without(local, "flops/teacher", "context/gap")  # it is not asked again
    for ours, theirs in zip(log(there), wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert all(sample["plain_logprobs"] == [] for sample in read_jsonl(there / "samples.jsonl"))


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(SYSTEM, id="fixed", marks=pytest.mark.slow),
        pytest.param(SAMPLES, id="samples", marks=pytest.mark.slow),
        pytest.param(SIBLINGS, id="siblings"),
    ],
)
def test_it_goes_on_in_the_middle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: dict[str, object]
) -> None:
    options = {**context, "checkpoint__every": 2, "optim__steps": 4}
    whole = distilled(distillation(tmp_path / "whole", folder, **options))
    settings = distillation(tmp_path / "run", folder, **options)
    interrupt(monkeypatch, settings, 3)
    check_equal(distilled(settings), whole)


def test_a_function_of_all_samples_of_a_row(folder: Path, tmp_path: Path) -> None:
    """It sees texts and rewards, and its prompts reach the samples that they are for."""
    done = run(tmp_path / "run", folder, **SAMPLES, optim__steps=1)
    words, groups = tokenizer(), dict[int, list[dict[str, Any]]]()
    for sample in done.samples:
        groups.setdefault(sample["prompt_index"], []).append(sample)
    plain = 0
    for group in groups.values():
        assert len(group) == 3
        best = max(group, key=lambda sample: sample["reward"])
        completion = words.decode(best["ids"][-best["completion_length"] :], skip_special_tokens=True)
        for sample in group:
            prompt = words.decode(sample["ids"][1 : -sample["completion_length"] - 1])
            failed = sample["reward"] < best["reward"]
            assert sample.get("teacher_text") == (f"<u>{len(completion)} {prompt}<a>" if failed else None)
            assert bool(sample["plain_logprobs"]) == failed
            plain += not failed
    (row,) = done.metrics
    assert 0 < row["context/plain_fraction"] < 1
    assert row["context/plain_fraction"] == pytest.approx(plain / len(done.samples))
    assert row["context/too_long_fraction"] == 0


def test_a_function_whose_prompts_are_too_long(folder: Path, tmp_path: Path) -> None:
    done = run(
        tmp_path / "run", folder, **SAMPLES | {"teacher__context__function": f"{HERE}.far_too_long"}, optim__steps=1
    )
    assert done.metrics[0]["context/too_long_fraction"] == 1
    assert all(sample["teacher_prompt"] is None for sample in done.samples)


def test_a_server_reads_what_a_function_writes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as the server can read, which is asked for before the first step."""
    options: dict[str, object] = {**SAMPLES, "optim__steps": 1}
    local = run(tmp_path / "local", folder, **options, teacher__context__max_tokens=9)
    assert 0 < local.metrics[0]["context/too_long_fraction"] < 1
    with serving(folder / "teacher") as stub:
        settings = distillation(tmp_path / "served", folder, **options, **served("teacher", stub))
        refusal(capsys, "distill", settings, "teacher.context.function is", "set teacher.context.max_tokens")
        long = settings | {"teacher.context.max_tokens": 60}
        refusal(capsys, "distill", long, "cannot score 68 tokens", "what teacher.context adds")
        there = Run.of(distilled(settings | {"teacher.context.max_tokens": 9}))
    assert there.metrics[0]["context/too_long_fraction"] == local.metrics[0]["context/too_long_fraction"]
    for ours, theirs in zip(there.samples, local.samples, strict=True):
        assert ours["teacher_prompt"] == theirs["teacher_prompt"]
        assert ours["teacher_logprobs"] == pytest.approx(theirs["teacher_logprobs"], abs=1e-4)


def test_a_function_that_fails_in_a_step(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = SAMPLES | {"teacher__context__function": f"{HERE}.too_few"}
    settings = distillation(tmp_path / "run", folder, **options)
    refusal(capsys, "distill", settings, "sums.jsonl:", "teacher.context.function gave", "for each of the 3 samples")


def test_what_the_teacher_cannot_hold_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = distillation(tmp_path / "run", folder, teacher__context__system="a" * 50)
    parts = [
        "sums.jsonl:10 with teacher.context has",
        "exceeds the teacher's context of 64",
        "what teacher.context adds",
    ]
    refusal(capsys, "distill", settings, *parts)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(loading, "load_model", None)  # seen before one is loaded
    refusal(capsys, "distill", settings, *parts)


def test_entries_of_a_mixture_may_share_a_teacher(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda model, **more: [load(model, **more), loads.append(model.path)][0])
    data, path = {"path": str(folder / "sums.jsonl")}, str(folder / "teacher")
    entries: dict[str, Any] = {
        name: {"data": data, "teacher": {"path": path, "context": {"system": name}}} for name in ("aa", "bb")
    }
    entries["plain"] = {"data": data, "teacher": {"path": path}}
    settings = distillation(tmp_path / "run", folder, teacher__path="", data__path="null", optim__steps=1)
    done = Run.of(distilled(settings | {"mixture": json.dumps(entries)}))
    assert sorted(Path(each).name for each in loads) == ["student", "teacher"]
    for sample in done.samples:
        text, name = sample.get("teacher_text"), sample["dataset"]
        assert text is None if name == "plain" else text.startswith(f"<s>{name}<u>")


WAYS: dict[str, dict[str, object]] = {
    "given": {"sampling__on_policy_fraction": 0.5},
    "in-portions": {"sampling__tokens_per_step": 3},
    "replies": {"environment__name": "class:nods.Nods", "environment__trust": "true", "environment__role": "user"},
    "padded-heads": {},
}


@pytest.mark.parametrize(("way", "options"), WAYS.items(), ids=WAYS)
def test_all_that_follows_a_prompt_follows_the_teachers(
    folder: Path, padded: Path, tmp_path: Path, way: str, options: dict[str, object]
) -> None:
    models = padded if way == "padded-heads" else folder
    length = {"sampling__max_new_tokens": 24} if way == "replies" else {}
    done = run(tmp_path / "run", models, **SYSTEM, **options, **length, optim__steps=2)
    teacher: Any = AutoModelForCausalLM.from_pretrained(models / "teacher")
    for sample in (sample for sample in done.samples if max(sample["ids"]) < teacher.config.vocab_size):
        wanted = token_logprobs(teacher, as_read(sample)).tolist()
        assert counted(sample, "teacher_logprobs") == pytest.approx(wanted, abs=1e-5)
    assert any(sample["given"] for sample in done.samples) == (way == "given")
    follow = [sample["completion_length"] - sum(sample["loss_mask"]) for sample in done.samples]
    assert any(follow) == (way in ("in-portions", "replies"))


def test_other_examples_are_another_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "examples.jsonl", sums(2))
    options = {"teacher__context__examples__path": file, "optim__steps": 2, "checkpoint__every": 1}
    distilled(distillation(tmp_path / "run", folder, **options) | {"optim.steps": 1})
    write_jsonl(file, sums(1))
    settings = distillation(tmp_path / "run", folder, **options) | {"resume": "change"}
    refusal(capsys, "distill", settings, "what the teacher of data reads changed since the run began")


def test_scores_of_completions_after_another_prompt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, object] = {"model.path": folder / "teacher", "data.path": folder / "sums.jsonl"}
    settings |= {"model.context.template": "{answer} {prompt}", "output": tmp_path / "scores.jsonl"}
    assert cli.main(arguments("score", settings)) == 0
    teacher: Any = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    for row, sample in zip(sums(), read_jsonl(tmp_path / "scores.jsonl"), strict=True):
        assert tokenizer().decode(sample["ids"]) == f"<u>{row['answer']} {row['prompt']}<a>{row['completion']}<eos>"
        wanted = token_logprobs(teacher, sample).tolist()
        assert counted(sample, "logprobs") == pytest.approx(wanted, abs=1e-5)
    other = settings | {"model.context.template": "{prompt}"}
    refusal(capsys, "score", other, "model.context.template")
    function = {"model.context.function": f"{HERE}.of_samples", "model.context.trust_context": "true"}
    del settings["model.context.template"]
    new = settings | function | {"output": tmp_path / "other.jsonl"}
    refusal(capsys, "score", new, "model.context.function", "there are no samples here")


def test_a_dry_run_shows_what_the_teacher_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flops = []
    for options, text in (({}, ""), (SYSTEM, "<s>in words<u>1+1=<a>"), (SAMPLES, f"{HERE}.of_samples writes")):
        assert cli.main([*arguments("distill", distillation(tmp_path / "run", folder, **options)), "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert text in said
        assert ("the teacher " in said) == bool(options)
        flops.append(float(next(line.split()[1] for line in said.splitlines() if "  teacher " in line)))
    assert flops[1] > flops[0]
    settings = distillation(tmp_path / "run", folder, teacher__context__system="a" * 50)
    refusal(capsys, "distill", settings | {"optim.steps": 1}, "with teacher.context has")


def test_a_teacher_with_a_chat_format_of_its_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that differs only where there is a system's turn, which the student's prompts have not."""
    words = tokenizer()
    words.chat_template = str(words.chat_template).replace(
        "<{{ message", "{{ '!' if message['role'] == 'system' }}<{{ message"
    )
    save_model(tmp_path / "other", words, seed=1)
    settings = distillation(tmp_path / "run", folder, teacher__path=tmp_path / "other", optim__steps=1)
    refusal(
        capsys,
        "distill",
        settings | {"teacher.context.system": "b"},
        "the chat templates of student and teacher differ",
    )
    distilled(settings)
