"""`fastkl probe`: its numbers are those of plain forward passes, its verdicts those of what was put in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import WORDS, completion_logprobs, refusal
from run_settings import MINIMAL, Settings, arguments, config, distillation
from segment_cases import segments, strangers, words
from server_cases import served
from stub_server import serving
from stub_vllm import StubVllm
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer.commands.probe import compare, written
from fastkl.trainer.commands.probe.table import lines
from fastkl.trainer.commands.probe.verdict import judged
from fastkl.trainer.data.samples import UNKNOWN, Sample, make_sample

K = 5
REWARD: Settings = {"reward.grader": "last_number", "reward.baseline": "none"}


def probed(said: pytest.CaptureFixture[str], settings: Settings) -> Any:
    """What `fastkl probe --json` says."""
    assert cli.main([*arguments("probe", settings), "--json"]) == 0
    return json.loads(said.readouterr().out)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Those of the next probe."""
    kept: list[Sample] = []

    def write(found: Any) -> Any:
        result = original(found)
        kept.extend(result.samples)
        return result

    original = written.write
    monkeypatch.setattr("fastkl.trainer.commands.probe.command.write", write)
    return kept


def settings(run: Path, folder: Path, **overrides: object) -> Settings:
    return distillation(run, folder, **{"prompts": 8, "top": K, **overrides})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_numbers_are_those_of_plain_forward_passes(
    tmp_path: Path, padded: Path, samples: list[Sample], capsys: pytest.CaptureFixture[str], temperature: float
) -> None:
    run = settings(tmp_path / "run", padded, sampling__temperature=temperature, batch__max_tokens=40)
    said = probed(capsys, run)
    assert not (tmp_path / "run").exists()
    models = [AutoModelForCausalLM.from_pretrained(padded / name) for name in ("student", "teacher")]
    ids = min(WORDS, *(model.config.vocab_size for model in models))
    gaps, entropies, overlaps, masses = [], [], [], []
    with torch.no_grad():
        for sample in samples:
            plain = vars(sample) | {"ids": sample.ids.tolist(), "loss_mask": sample.loss_mask.tolist()}
            whole = [completion_logprobs(model, plain, temperature) for model in models]
            tokens = torch.tensor(sample.ids[sample.loss_mask]).long()[:, None]
            known = tokens < whole[1].shape[1]
            scored = whole[1].gather(1, tokens.where(known, 0)).where(known, UNKNOWN)
            gaps += (whole[0].gather(1, tokens) - scored)[:, 0].tolist()
            entropies += (-(whole[0].exp() * whole[0]).sum(-1)).tolist()
            ours, theirs = (completion_logprobs(model, plain, temperature, ids=ids) for model in models)
            likeliest, own = theirs.topk(K).indices, ours.topk(K).indices
            overlaps += [len({*a} & {*b}) / K for a, b in zip(likeliest.tolist(), own.tolist(), strict=True)]
            masses += torch.stack([each.gather(1, likeliest).exp().sum(-1) for each in (ours, theirs)], -1).tolist()
    assert said["teacher_kl"]["mean"] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert said["teacher_kl"]["p95"] == pytest.approx(np.percentile(gaps, 95), abs=1e-4)
    assert said["entropy"]["mean"] == pytest.approx(np.mean(entropies), abs=1e-4)
    assert said["entropy"]["p05"] == pytest.approx(np.percentile(entropies, 5), abs=1e-4)
    assert said["top_k"]["overlap"] == pytest.approx(np.mean(overlaps), abs=1e-6)
    assert [said["top_k"][name] for name in ("student_mass", "teacher_mass")] == pytest.approx(
        np.mean(masses, 0), abs=1e-4
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    said = probed(capsys, settings(tmp_path / "run", folder, teacher__path=folder / "student", output=output))
    assert said["verdict"] == "nothing to learn on these prompts"
    assert said["accuracy"]["gap"] == {"greedy": 0.0, "sampled": pytest.approx(0.0, abs=1.0)}
    assert json.loads(output.read_text()) == said
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_teacher_without_a_head_is_broken(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "flat", tie_word_embeddings=False)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "flat")
    torch.nn.init.zeros_(teacher.get_output_embeddings().weight)
    teacher.save_pretrained(tmp_path / "flat")
    assert cli.main(arguments("probe", settings(tmp_path / "run", folder, teacher__path=tmp_path / "flat"))) == 0
    printed = capsys.readouterr().out
    assert "the teacher is broken: the teacher's log-probs are uniform" in printed
    assert printed.rstrip().endswith("verdict: the teacher is broken")


@pytest.fixture
def stub(folder: Path) -> Iterator[StubVllm]:
    with serving(folder / "teacher", kind=StubVllm) as server:
        yield server


def test_a_served_teacher_scores_and_answers_as_one_that_is_loaded(
    tmp_path: Path, folder: Path, stub: StubVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    here = probed(capsys, settings(tmp_path / "run", folder))
    there = probed(capsys, settings(tmp_path / "run", folder, **served("teacher", stub)))
    assert there["teacher_kl"] == pytest.approx(here["teacher_kl"], abs=1e-3)
    assert there["accuracy"]["teacher"]["greedy"] == here["accuracy"]["teacher"]["greedy"]
    assert there["top_k"] == {}


def test_a_context_is_what_the_teacher_answers_after(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[list[int]] = []
    answered = written._answered

    def seen(found: Any, responder: Any, prompts: Any, *args: Any) -> Any:
        lengths.append([len(prompt.tokens) for prompt in prompts])
        return answered(found, responder, prompts, *args)

    monkeypatch.setattr(written, "_answered", seen)
    probed(capsys, settings(tmp_path / "run", folder, teacher__context__system="in words", data__chat_template=True))
    student, teacher = lengths
    assert all(theirs >= ours + len("in words") for ours, theirs in zip(student, teacher, strict=True))


@pytest.mark.parametrize("where", ["here", "compared", "served", "lists"])
def test_a_teacher_with_its_own_tokenizer(
    tmp_path: Path,
    samples: list[Sample],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """d of segments, and answers in the tokens of each."""
    models, texts = strangers(tmp_path, "characters", "pairs"), dict[str, list[str]]()
    monkeypatch.setattr(written, "by_text", lambda grader, words: lambda t, _: _read(texts, words, t.answer_ids))
    with serving(models / "teacher", words("pairs"), kind=StubVllm) as server:
        own: Settings = {"teacher__tokenizer": f"own:{models / 'teacher'}", **served("teacher", server)}
        here: Settings = {"teacher__tokenizer": "own"}
        chosen: dict[str, Settings] = {
            "here": here,
            "compared": here | {"loss__objective": "reverse_kl"},
            "served": own,
            "lists": own | {"loss__objective": "top_k", "loss__top_k": 5},
        }
        said = probed(capsys, settings(tmp_path / "run", models, **chosen[where]))
    d, size = [], 0
    for sample in samples:
        start, theirs = sample.prompt_length, words("pairs").convert_ids_to_tokens(sample.teacher_completion.tolist())
        for part in segments(words("characters").convert_ids_to_tokens(sample.ids[start:].tolist()), theirs):
            ours = sample.sampler_logprobs[[start + i for i in part.ours]].sum()
            d.append(ours - sample.teacher_completion_logprobs[part.theirs].sum())
            size += sum(len(theirs[j]) for j in part.theirs if theirs[j] != "<eos>")
    assert said["unit"] == "segment"
    assert said["teacher_kl"]["mean"] == pytest.approx(np.mean(d), abs=1e-4)
    assert said["teacher_kl"]["p95"] == pytest.approx(np.percentile(d, 95), abs=1e-4)
    assert said["alignment"]["teacher_kl_per_byte"] == pytest.approx(np.sum(d) / size, abs=1e-4)
    assert said["metrics"]["teacher_kl"] == pytest.approx(np.sum(d) / said["tokens"], abs=1e-4)
    assert said["top_k"] == {}
    assert "its tokens are not the student's" in said["missing"][0]
    assert said["objective"] == "policy_gradient"
    assert set(said["accuracy"]["teacher"]) == {"greedy", "sampled"}
    teacher, prompt = AutoModelForCausalLM.from_pretrained(models / "teacher"), samples[0].teacher_prompt
    assert prompt is not None
    answer = teacher.generate(torch.tensor([prompt.tolist()]), do_sample=False, max_new_tokens=8)[0, len(prompt) :]
    assert words("pairs").decode(answer, skip_special_tokens=True) in texts["pairs"]
    printed = "\n".join(lines(said))
    assert "nats per segment" in printed
    assert f"student {said['alignment']['samples'][0]['student']}" in printed
    assert "nats per byte" in printed


def _read(texts: dict[str, list[str]], known: Any, ids: list[int]) -> float:
    kind = "pairs" if len(known) == len(words("pairs")) else "characters"
    texts.setdefault(kind, []).append(known.decode(ids, skip_special_tokens=True))
    return 0.0


def test_rows_without_answers_are_not_graded(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    said = probed(capsys, settings(tmp_path / "run", folder, data__path=tmp_path / "bare.jsonl"))
    assert said["accuracy"] == {"student": {}, "teacher": {}, "gap": {}, "gap_se": {}}
    assert "nothing is graded" in said["missing"][0]


def test_a_template_that_only_one_of_them_knows() -> None:
    def sample(first: float, rest: float, last: float, truncated: bool = False) -> Sample:
        made = make_sample([1, 2], range(3, 13), 0, [-1.0] * 10, truncated)
        made.teacher_logprobs = [0, 0, -1 - first, *[-1 - rest] * 8, -1 - last]
        return made

    pair = [sample(9.0, 0.125, 0.0), sample(9.0, 0.125, 50.0, truncated=True)]
    pair[1].teacher_logprobs = [*pair[1].teacher_logprobs[:-1], -1.0]
    shares = compare._shares(pair, [compare.gaps(each) for each in pair])
    assert shares["first_token"] == pytest.approx(0.9)
    assert (shares["last_token"], shares["last_tokens_of_all"]) == (0.0, pytest.approx(1 / 20))


GOOD: dict[str, Any] = {
    "prompts": 64,
    "samples": 64,
    "tokens": 900,
    "unit": "token",
    "alignment": {},
    "vocabularies": [100],
    "has_experts": False,
    "accuracy": {
        "student": {"greedy": {"mean": 0.25, "se": 0.05}},
        "teacher": {"greedy": {"mean": 0.98, "se": 0.02}},
        "gap": {"greedy": 0.73},
        "gap_se": {"greedy": 0.05},
    },
    "teacher_kl": {"mean": 0.5, "p50": 0.0},
    "entropy": {"mean": 0.13, "p50": 0.0},
    "top_k": {"k": 20, "overlap": 0.9, "student_mass": 0.99, "teacher_mass": 0.99},
    "share_of_gap": {
        "first_token": 0.05,
        "last_token": 0.05,
        "top_1_percent": 0.2,
        "first_tokens_of_all": 0.07,
        "last_tokens_of_all": 0.07,
        "first_token_mean": 0.3,
        "last_token_mean": 0.3,
    },
    "metrics": {
        "teacher_kl": 0.5,
        "entropy": 0.13,
        "completions/mean_length": 13.0,
        "completions/truncated_fraction": 0.0,
        "completions/looping_fraction": 0.0,
        "teacher_logprobs/mean": -0.7,
        "teacher_logprobs/std": 2.0,
        "sampler_mismatch/kl": 1e-8,
        "advantages/top_share": 0.2,
    },
    "run": {"memory_bytes": 1e9, "memory_is_whole": True, "flops": 1e12, "steps": 10, "served_teachers": 1},
    "missing": [],
}
VERDICTS: dict[str, tuple[dict[str, Any], str]] = {
    "fine": ({}, "fine"),
    "memorised": ({"metrics": {"teacher_kl": 0.01, "entropy": 0.01}}, "nothing to learn on these prompts"),
    "beginning": ({"share_of_gap": {"first_token": 0.6, "first_token_mean": 9.0}}, "formats differ"),
    "end": ({"share_of_gap": {"last_token": 0.6, "last_token_mean": 9.0}}, "formats differ"),
    "cut": ({"metrics": {"completions/truncated_fraction": 0.6}}, "truncated"),
    "loops": (
        {"metrics": {"completions/looping_fraction": 0.6, "completions/truncated_fraction": 0.7}},
        "completions repeat themselves",
    ),
    "strangers": ({"metrics": {"teacher_kl": 6.0}}, "too far apart"),
    "strangers-that-know-no-end": (
        {"metrics": {"teacher_kl": 8.7, "completions/truncated_fraction": 1.0}},
        "too far apart",
    ),
    "long-completions": (
        {"share_of_gap": {"first_token": 0.03, "first_token_mean": 12.0, "first_tokens_of_all": 0.002}},
        "formats differ",
    ),
    "surprised-ever-after": ({"share_of_gap": {"first_token": 0.24, "first_token_mean": 14.0}}, "formats differ"),
    "as-far-at-the-first": (
        {"metrics": {"teacher_kl": 8.7}, "share_of_gap": {"first_token": 0.09, "first_token_mean": 8.7}},
        "too far apart",
    ),
    "other-words": ({"top_k": {"overlap": 0.1}}, "too far apart"),
    "no-better": ({"accuracy": {"gap": {"greedy": 0.05}}}, "the teacher is no better"),
    "always-a-little-better": ({"accuracy": {"gap": {"greedy": 0.05}, "gap_se": {"greedy": 0.02}}}, "fine"),
    "one-prompt": ({"accuracy": {"gap": {"greedy": 0.0}, "gap_se": {"greedy": None}}}, "fine"),
    "outliers": ({"metrics": {"advantages/top_share": 0.95}}, "few tokens have it all"),
    "sampler": ({"metrics": {"sampler_mismatch/kl": 0.1}}, "the sampler is wrong"),
    "flat": ({"metrics": {"teacher_logprobs/std": 0.0}}, "the teacher is broken"),
    "short": (
        {"share_of_gap": {"first_token": 0.6, "first_token_mean": 9.0, "first_tokens_of_all": 0.5}},
        "fine",
    ),
}


@pytest.mark.parametrize(("changes", "verdict"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(changes: dict[str, Any], verdict: str) -> None:
    said = {
        name: {**value, **changes.get(name, {})} if isinstance(value, dict) else value for name, value in GOOD.items()
    }
    settings = config("probe", MINIMAL["distill"])
    found = said | judged(said, settings)
    assert found["verdict"] == verdict
    text = "\n".join(lines(found))
    assert text.endswith(f"verdict: {verdict}")
    assert f"\n{verdict}: " in text or verdict == "fine"
    assert "too far apart" not in text or "likeliest" not in text or changes.get("top_k")


def test_a_low_temperature_sets_all_log_probs_apart() -> None:
    """Those of both are of the samples' temperature."""
    changes = {"teacher_kl": 9.0, "teacher_logprobs/mean": -60.0}
    said = GOOD | {"metrics": GOOD["metrics"] | changes}
    cold = config("probe", MINIMAL["distill"] | {"sampling.temperature": 0.1})
    assert judged(said, cold)["verdict"] == "fine"
    assert judged(said, config("probe", MINIMAL["distill"]))["verdict"] == "the teacher is broken"


def test_a_gap_is_as_sure_as_its_differences_by_prompt() -> None:
    """Prompts are hard or easy for both."""

    def scores(*values: float, samples: int = 1) -> list[written.Score]:
        return [written.Score(prompt, value) for prompt, value in enumerate(values) for _ in range(samples)]

    student = {"greedy": scores(0, 0, 1, 1), "sampled": scores(0, 0, 1, 1, samples=2)}
    teacher = {"greedy": scores(0, 1, 1, 1), "sampled": scores(1, 1, 1, 1)}
    found = compare._accuracies(written.Written([], student, teacher, [], None))
    assert found["gap"] == {"greedy": 0.25, "sampled": 0.5}
    assert found["gap_se"]["greedy"] == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)
    assert found["gap_se"]["sampled"] == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)


def test_few_tokens_are_few_to_judge_by() -> None:
    few, many = (
        "\n".join(lines(GOOD | {"tokens": tokens, "verdict": "fine", "reasons": [], "objective": "reverse_kl"}))
        for tokens in (13, 900)
    )
    assert "13 tokens are few to judge by" in few
    assert "few to judge by" not in many


@pytest.mark.parametrize(
    ("objective", "kl", "verdict"),
    [
        ("policy_gradient", 0.09, "nothing to learn on these prompts"),
        ("reverse_kl", 0.09, "little to learn on these prompts"),
        ("top_k", 0.09, "little to learn on these prompts"),
        ("reverse_kl", 0.01, "nothing to learn on these prompts"),
        ("reverse_kl", 0.2, "fine"),
    ],
)
def test_distributions_have_a_little_to_teach_a_sure_student(objective: str, kl: float, verdict: str) -> None:
    said = GOOD | {"metrics": GOOD["metrics"] | {"teacher_kl": kl, "entropy": 0.03}}
    found = judged(said, config("probe", MINIMAL["distill"] | {"loss.objective": objective}))
    assert (found["verdict"], len(found["reasons"])) == (verdict, int(verdict != "fine"))


@pytest.mark.parametrize(
    ("kl", "verdict"), [(0.010, "fine"), (0.09, "the sampler is wrong, or has too few bits")], ids=str
)
def test_a_copy_in_bfloat16_may_differ_by_rounding(kl: float, verdict: str) -> None:
    said = GOOD | {"metrics": GOOD["metrics"] | {"sampler_mismatch/kl": kl}}
    found = judged(said, config("probe", MINIMAL["distill"] | {"sampling.dtype": "bfloat16"}))
    assert found["verdict"] == verdict
    assert all("bfloat16" in reason["text"] and "sampling.dtype" in reason["advice"] for reason in found["reasons"])


@pytest.mark.parametrize("lesson", [REWARD, {"sampling.on_policy_fraction": 0.5}], ids=["reward", "given"])
def test_something_else_teaches_without_a_gap(lesson: dict[str, object]) -> None:
    said = GOOD | {"metrics": GOOD["metrics"] | {"teacher_kl": 0.0}}
    assert judged(said, config("probe", MINIMAL["distill"]))["verdict"] == "nothing to learn on these prompts"
    assert judged(said, config("probe", MINIMAL["distill"] | lesson))["verdict"] == "fine"


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"teacher.path": "", "loss.kl_coef": 0, **REWARD}, ["has no teacher"]),
        ({"prompts": 0}, ["prompts is 0"]),
        ({"output": "nowhere/found.json"}, ["output is nowhere/found.json, where no file can be written"]),
        ({"output": "/proc/found.json"}, ["output is /proc/found.json, where no file can be written"]),
        ({"output": "."}, ["output is ., where no file can be written"]),
    ],
)
def test_what_a_probe_refuses(
    empty_folder: Path, capsys: pytest.CaptureFixture[str], settings: Settings, parts: list[str]
) -> None:
    refusal(capsys, "probe", MINIMAL["distill"] | settings, *parts)


def test_several_processes_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refusal(capsys, "probe", MINIMAL["distill"], "fastkl probe runs in one process")
