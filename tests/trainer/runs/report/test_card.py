"""The model card that a run writes into its student: true, valid for the Hub, and silent about this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from run_cases import run
from run_settings import MINIMAL, SERVED, config, evaluated

import fastkl
from fastkl.trainer.runs.report.card import adapter_card, public, student_card

HUB = {"student.path": "owner/base", "teacher.path": "owner/teacher", "data.dataset": "owner/prompts"}
ROWS = {"the rows of data": "0123456789abcdef0123"}


def card(command: str, rows: list[dict[str, Any]] | None = None, **settings: object) -> str:
    return student_card(config(command, MINIMAL[command] | settings), ROWS, rows or [])


def checked(text: str) -> dict[str, Any]:
    """The front matter, as the Hub's client reads it; the Hub wants these to be ids."""
    data = ModelCard(text).data.to_dict()
    for name in [data.get("base_model", "a/b"), *data.get("datasets", [])]:
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    return data


def test_a_run_writes_the_card_of_its_student_and_of_its_adapter(tmp_path: Path, padded: Path) -> None:
    done = run(tmp_path / "first", padded, student__lora__rank=2, optim__steps=1, **evaluated(padded))
    text = (done.folder / "student/README.md").read_text(encoding="utf-8")
    assert checked(text)["library_name"] == "transformers"
    assert checked(text)["tags"] == ["fastkl", "on-policy-distillation", "lora"]
    assert "\n# first\n" in text
    first, last = (done.metrics[i]["eval/accuracy"] for i in (0, -1))
    assert f"| accuracy on held-out prompts | {first:.4g} (step 0) | {last:.4g} (step 1) |" in text
    assert re.search(r"\| data \| `sums.jsonl`, SHA-256 of the rows as read: `[0-9a-f]{16}` \|", text)
    adapter = (done.folder / "student/adapter/README.md").read_text(encoding="utf-8")
    assert checked(adapter)["library_name"] == "peft"
    for written in (text, adapter):
        assert [path for path in (tmp_path, padded, Path.home()) if str(path) in written] == []


def test_what_is_on_the_hub_is_in_the_front_matter() -> None:
    settings = {"run": "runs/a", **HUB, "student.lora.rank": 4}
    data = checked(student_card(config("distill", settings), ROWS, []))
    assert (data["base_model"], data["datasets"]) == ("owner/base", ["owner/prompts"])
    assert checked(adapter_card(config("distill", settings)))["base_model"] == "owner/base"


def test_what_it_was_evaluated_on_is_named_and_not_as_what_it_was_trained_on() -> None:
    sets = {"eval.data.dataset": "owner/held-out", "eval.more": {"other": {"data": {"path": "/there/other.jsonl"}}}}
    rows = ROWS | {"the rows of eval.more.other.data": "fedcba9876543210fedc"}
    text = student_card(config("distill", {"run": "runs/a", **HUB, **sets}), rows, [])
    assert checked(text)["datasets"] == ["owner/prompts"]
    assert "| eval.data | `owner/held-out`" in text
    assert "| eval.more.other.data | `other.jsonl`, SHA-256 of the rows as read: `fedcba9876543210` |" in text


def test_the_base_of_a_student_that_is_here_is_that_of_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card("sft", **{"student.path": "owner/base"}), encoding="utf-8")
    assert checked(card("distill", **{"student.path": tmp_path}))["base_model"] == "owner/base"
    no_date, no_text = b"---\nbase_model: a/b\ndate: 2024-13-01\n---\n", b"---\nbase_model: a/b\n---\n\xe9"
    for other in (b"", b"---\nbase_model: /home/a\n---\n", b"---\n- a\n---\n", b"---\n: :\n---\n", no_date, no_text):
        (tmp_path / "README.md").write_bytes(other)
        assert "base_model" not in checked(card("distill", **{"student.path": tmp_path}))


HELD_OUT = {"eval.data.path": "h.jsonl"}
OWN = {"teacher.path": "", "teacher.self": "base", "student.lora.rank": 2, "teacher.context.template": "{prompt}!"}
REWARDS = {"teacher.path": "", "reward.grader": "boxed", "loss.kl_coef": 0, "sampling.samples_per_prompt": 2}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "`s` learned from `t` by [on-policy distillation]"),
        (SERVED, "learned from `m` by"),
        (OWN, "`itself (base)`"),
        (REWARDS, "`s` learned from rewards of its own completions."),
        ({"loss.objective": "jsd"}, "| objective | `jsd` |"),
        ({"loss.control": "shuffled"}, "| control | `shuffled`: no model to be used |"),
        ({"data.path": "gone/rows"}, "| data | `rows`, SHA-256"),
        ({"push_to_hub": "me/mine"}, 'from_pretrained("me/mine"'),
    ],
)
def test_it_says_what_the_run_was(settings: dict[str, object], said: str) -> None:
    text = card("distill", **settings)
    checked(text)
    assert said in text
    assert f"fastkl {fastkl.__version__}" in text


def test_the_figures_are_those_of_the_student_that_was_kept() -> None:
    rows = [{"step": step, "eval/accuracy": step / 10 if step < 3 else 0.1, "flops/student": 1e9} for step in range(5)]
    text = student_card(config("sft", MINIMAL["sft"] | {"checkpoint.best": "student"} | HELD_OUT), ROWS, rows, kept=2)
    assert "| kept | the student after step 2, with the best accuracy on held-out prompts |" in text
    assert "|  | first | kept |" in text
    assert "| accuracy on held-out prompts | 0 (step 0) | 0.2 (step 2) |" in text
    assert "| FLOPs |  | 5e+09 |" in text


def test_sft() -> None:
    text = card("sft", [{"step": 1, "loss": 2.0, "flops/student": 1e9}, {"step": 2, "loss": 1.0, "flops/student": 1e9}])
    assert "`s` was fine-tuned on given completions." in text
    assert "| loss | 2 (step 1) | 1 (step 2) |\n| FLOPs |  | 2e+09 |" in text
    assert "teacher" not in text


def test_a_path_has_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert public("owner/base") == "owner/base"
    assert public(str(tmp_path / "models" / "own")) == "own"
    (tmp_path / "owner" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public("owner/here") == "here"
    assert public("owner/gone") == "gone"
    assert "base_model" not in checked(card("distill", **{"student.path": "owner/gone"}))
    assert public("../owner/x") == "x"
    assert public("~/models/x") == "x"
