"""The recipe of new knowledge and old manners: what it teaches, what it grades, and which runs it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_cases import RECIPES, Load, assert_verified
from tiny_models import save_model

from bench.tables import personalisation
from fastkl.trainer.commands.command_line import parse


def test_facts_are_taught_under_other_words_than_they_are_asked_for(recipe: Load) -> None:
    company, evaluate = recipe("personalisation", "company", "evaluate")
    answers: list[set[str]] = []
    for name, people in company.SETS.items():
        taught, asked = list(company.learned(name)), list(company.graded(name))
        assert not {row["prompt"] for row in taught} & {row["prompt"] for row in asked}
        for row in asked:
            assert any(evaluate.knows(known["completion"], row["answer"]) for known in taught)
            assert evaluate.knows(row["document"], row["answer"])
            assert row["answer"] not in row["prompt"]
        assert {person for person in people if any(person in row["prompt"] for row in asked)} == set(people)
        answers.append({row["answer"] for row in asked})
        assert 2 * len(answers[-1]) == len(asked)  # each word belongs to one person, who is asked for it twice
    assert not answers[0] & answers[1]  # what is known of one set says nothing of the other


@pytest.mark.parametrize(
    ("kind", "does", "does_not"),
    [
        ("detectable_format:title", "<<Leaves>> They fall.", "Leaves. They fall."),
        ("detectable_content:postscript", "They fall.\nP.S. In autumn.", "They fall. In autumn."),
        ("length_constraints:number_words", "leaf " * 30, "leaf " * 29),
        ("detectable_format:json_format", '{"answer": "leaves"}', "leaves"),
        ("keywords:existence", "It takes time and water.", "It takes time."),
    ],
)
def test_instructions_are_verified(recipe: Load, kind: str, does: str, does_not: str) -> None:
    pytest.importorskip("if_verifiable")
    (instructions,) = recipe("personalisation", "instructions")
    assert_verified(instructions.follows, kind, does, does_not)


def test_no_terse_answer_follows_an_instruction(recipe: Load) -> None:
    pytest.importorskip("if_verifiable")
    company, instructions = recipe("personalisation", "company", "instructions")
    answers = [row["completion"] for name in company.SETS for row in company.learned(name)]
    assert not any(instructions.follows(answer, kind) for answer in answers for kind in instructions.INSTRUCTIONS)


def test_chat_prompts_hold_nothing_of_the_company_and_nothing_that_is_graded(
    recipe: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    company, instructions = recipe("personalisation", "company", "instructions")
    monkeypatch.setattr(instructions, "wording", str)
    chat, graded = list(instructions.chat_prompts()), list(instructions.graded_prompts())
    assert not set(instructions.LEARNED_WITH) & set(instructions.GRADED_WITH)
    assert len({row["prompt"] for row in chat + graded}) == len(chat + graded)
    people = [name for names in company.SETS.values() for name in names]
    words = [company.COMPANY, *people, *(row["answer"] for name in company.SETS for row in company.graded(name))]
    for row in chat + graded:
        assert not [word for word in words if word in row["prompt"]]


def test_every_phase_is_accepted_and_goes_on_from_an_earlier_one(recipe: Load) -> None:
    phases, series = recipe("personalisation", "phases", "series")
    done: set[str] = set()
    for name, phase in phases.PHASES.items():
        assert {phase.student, phase.teacher} - {None} <= done
        done.add(name)
        settings = phases.settings_of(name, 1) | {"run": phases.folder(name, 1)}
        config = parse(series.words(phase.command, RECIPES / "personalisation" / phase.config, settings))[1]
        if phase.command == "sft":
            share = 100 if name == "second" else int(name.removeprefix("documents_"))
            wanted = {"documents": share} | ({"chats": 100 - share} if share < 100 else {})
            assert {key: entry.weight for key, entry in config.mixture.items()} == wanted
    assert phases.needed([]) == list(phases.PHASES)
    assert phases.needed(["second_recovered"]) == ["documents_100", "recovered", "second", "second_recovered"]


def test_results_are_those_of_phases(recipe: Load) -> None:
    (phases,) = recipe("personalisation", "phases")
    report = json.loads((RECIPES / "personalisation" / "results.json").read_text(encoding="utf-8"))
    assert report["runs"][0]["phase"] == "before"
    assert {run["phase"] for run in report["runs"][1:]} <= set(phases.PHASES)


def test_answers_that_end_are_told_from_those_that_are_cut(recipe: Load, tmp_path: Path) -> None:
    (evaluate,) = recipe("personalisation", "evaluate")
    save_model(tmp_path / "model", max_position_embeddings=512)
    model = evaluate.Model(tmp_path / "model")
    answers = model.answers(["1 + 1", "2"], 4)
    assert len(answers) == 2
    (row,) = evaluate.graded(model, [{"prompt": "1 + 1", "answer": answers[0].text}], 4, evaluate.knows)
    assert row["does"]
    assert row["completion"] == answers[0].text


def test_table_of_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(phase: str, first: float, **more: object) -> dict[str, object]:
        kinds = {"a:b": first}
        known = {"first": first, "second": 0.0}
        return {"phase": phase, "knows": known, "follows": 0.5, "follows_by_kind": kinds, "words": 10.4, **more}

    runs = [run("before", 0.0, reads=0.5), run("read", 0.25, flops=1e12), run("read", 0.75, flops=3e12)]
    report = {
        "runs": runs,
        "machine": {"cpu": "A CPU", "threads": 1},
        "versions": {"torch": "2", "transformers": "5"},
        "date": "2026-11-29",
    }
    monkeypatch.setattr(personalisation, "read_recipe", lambda name: report)
    table = personalisation.phases()
    assert "| `before` | 0% | 0% | 50% | 10 | |\n" in table
    assert "| … with the document before the question | 50% | – | – | – | – |\n" in table
    assert "\nMeans of 2 seeds at most, in brackets each.\n" in table
    assert "| `read` | 50% (25%, 75%) | 0% (0%, 0%) | 50% (50%, 50%) | 10 | 2.0e+12 |\n" in table
    assert "| `a:b` | 0% | 50% |\n" in personalisation.kinds()
