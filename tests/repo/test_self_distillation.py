"""The recipe of contexts into weights: what it grades, what it learns from, and which runs it makes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from recipe_cases import Load, assert_verified
from tiny_data import read_jsonl, write_jsonl
from tiny_models import save_model, tokenizer

from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.sft import sft


@pytest.mark.parametrize(
    ("rule", "obeys", "does_not"),
    [
        ("capitals", "BREAD IS OLD.", "Bread IS OLD."),
        ("json", '{"answer": "bread"', '{"bread": "answer"'),
        ("short", "Bread is food.", "Bread is food because"),
        ("question", "Why do you ask?", "It is food. Why do you ask?"),
        ("pirate", "Arrr, that be bread, matey", "Harry ate the year's bread"),
    ],
)
def test_rules_are_verified(recipe: Load, rule: str, obeys: str, does_not: str) -> None:
    (rules,) = recipe("self_distillation", "rules")
    assert_verified(rules.obeys, rule, obeys, does_not)


SPANISH = (
    "El límite de la vida es una cosa más importante que",
    "La miel es un producto natural que las abejas producen a partir del néctar de las flores.",
    "Los elefantes son los animales terrestres más grandes del mundo. Tienen una trompa larga",
    "¡Hola! Las hojas de los árboles caen en otoño porque hace frío",
    "¿Por qué nos importa la música? Porque alegra el corazón de todos",
    "En el siglo XIX, las vías del tren unieron pueblos y ciudades de toda Europa",
    "La sal es blanca.",
    "El sol es uno de los motores de la creación,",  # cut after a comma
)
NOT_SPANISH = (
    "Elí,á é. en de en",  # what a student without a teacher writes
    "Elí,\n\néo.\n\nen de\n\nen.\n\n.\n.",
    "Elí,á é. en de en la de los el de que",
    "él é í. de la, el en. el, en. de é",
    "La la la la la la la la la",
    "El pan de la de la de la de la de la de la",
    "de la que en el los del las por con para un una",
    "el xqzt de la brmfk que los wkrtz en las qqq del",
    "1. 2. 3. el de la",
    "Railways have been used for centuries to transport goods and people across the country",
    "The history of the word de la Cruz in Spain is long",
    "Los elephants are the largest land animals in the world and",
    "L'histoire de la France est une longue suite de guerres et de rois",
    "La storia di Roma è una delle più lunghe del mondo e della",
    "A história do Brasil é muito longa e não começou com os portugueses",
    "",
)


@pytest.mark.parametrize("text", SPANISH)
def test_spanish(recipe: Load, text: str) -> None:
    (rules,) = recipe("self_distillation", "rules")
    assert rules.obeys(text, "spanish")


def test_what_is_asked_about_keeps_its_name(recipe: Load) -> None:
    (spanish,) = recipe("self_distillation", "spanish")
    for text in ("El salt es un mineral,", "El lighthouses es uno de los mejores faros."):
        assert not spanish.is_spanish(text)
        assert spanish.is_spanish(text, "Tell me about salt and lighthouses.")
    assert not spanish.is_spanish("Tell me about salt and lighthouses.", "Tell me about salt.")


@pytest.mark.parametrize("text", NOT_SPANISH)
def test_other_languages_and_garbage_are_not_spanish(recipe: Load, text: str) -> None:
    (rules,) = recipe("self_distillation", "rules")
    assert not rules.obeys(text, "spanish")


def test_nothing_that_is_graded_is_learned_from(recipe: Load) -> None:
    rules, tasks = recipe("self_distillation", "rules", "tasks")
    parts = [list(rules.questions(topics)) for topics in (rules.LEARNED_ABOUT, rules.GRADED_ABOUT)]
    for rows in (parts, tasks.parts_of_kind()):
        prompts = [row["prompt"] for part in rows for row in part]
        assert len(set(prompts)) == len(prompts)
    for rows in tasks.parts_of_kind():
        counts = [sum(row["answer"] == kind for row in rows) for kind in tasks.KINDS]
        assert len(set(counts)) == 1  # naming one kind always is right as often as chance says
    assert tasks.is_right(" Bird.\n", "bird")
    assert not tasks.is_right("bird fish", "bird")


def test_only_the_teacher_reads_the_context(recipe: Load) -> None:
    parts, rules = recipe("self_distillation", "parts", "rules")
    found = parts.parts()
    for part in found.values():
        row = part.learned[0]
        assert part.chat(row, prompted=False) == [{"role": "user", "content": row["prompt"]}]
        assert part.chat(row, prompted=True)[-1:] == part.chat(row, prompted=False)
        assert not any("completion" in row for row in part.learned)  # no right answer is at hand
    assert found["rule"].chat(row, prompted=True)[0] == {"role": "system", "content": rules.RULES["spanish"][0]}
    assert len(found["examples"].chat(row, prompted=True)) == 2 * len(found["examples"].examples) + 1


def test_arms_are_accepted(recipe: Load) -> None:
    parts, series, arms = recipe("self_distillation", "parts", "series", "arms")
    for part in parts.parts().values():
        for arm in arms.LOSSES:
            parse(series.words("distill", part.yaml, arms.loss_settings(arm)))


@pytest.fixture
def small(recipe: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The recipe's modules with a tiny model in the place of SmolLM2, where the working directory is."""
    monkeypatch.chdir(tmp_path)
    names = ("series", "arms", "outputs", "measure", "parts")
    *modules, parts = recipe("self_distillation", *names)
    save_model(Path("runs/smollm2/teacher"), max_position_embeddings=512)
    return SimpleNamespace(**dict(zip(names, modules, strict=False)), rule=parts.parts()["rule"])


def test_outputs_cost_what_distillation_did_and_no_more(small: SimpleNamespace) -> None:
    run, budget, length = Path("runs/sft-0"), 3e7, 4
    run.parent.mkdir(exist_ok=True)
    settings, writing = small.outputs.prepare_outputs(small.rule, run, length, 0, budget)
    rows = read_jsonl(settings["data.path"])
    config = parse(small.series.words("sft", small.rule.yaml.with_name("sft.yaml"), {"run": run, **settings}))[1]
    assert config.optim.steps == len(rows) // config.examples_per_step > 1
    assert {row["prompt"] for row in rows} <= {row["prompt"] for row in small.rule.learned}
    longest = max(len(tokenizer()(row["completion"])["input_ids"]) for row in rows)
    assert longest <= length * small.rule.config.sampling.max_new_tokens
    sft(config)
    spent = writing + small.series.total_flops(run)
    assert (
        0.9 * budget < spent < 1.02 * budget
    )  # each completion gets an end, which was not counted when it was written
    assert small.outputs.prepare_outputs(small.rule, run, length, 0, budget) == (settings, writing)  # not written twice


def test_nothing_is_written_without_a_budget(small: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="run the arm distill of rule with seed 3 first"):
        small.arms.train(small.rule, "sft", 3)


def test_results_are_in_the_order_of_the_arms_and_graded_anew(small: SimpleNamespace) -> None:
    for arm, seed in (("sft", 1), ("distill", 1), ("sft_long", 0), ("distill", 0), ("plain", None)):
        folder = small.rule.folder / (arm if seed is None else f"{arm}-{seed}")
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"arm": arm, "seed": seed, "flops": 1.0}))
        write_jsonl(
            folder / "answers.jsonl", [{"prompt": "", "completion": text} for text in (SPANISH[0], *NOT_SPANISH[:3])]
        )
    rows = list(small.measure.results(small.rule))
    found = [(row["arm"], row["seed"]) for row in rows]
    assert found == [("plain", None), ("distill", 0), ("distill", 1), ("sft", 1), ("sft_long", 0)]
    assert all((row["does"], row["answers"], row["flops"]) == (0.25, 4, 1.0) for row in rows)


def test_contexts_are_probed_with_and_without_them(recipe: Load) -> None:
    (probe,) = recipe("self_distillation", "probe")
    model = SimpleNamespace(answers=lambda chats, count: ["1. I" if len(chat) > 1 else "I" for chat in chats])
    rules = {row["rule"]: (row["without"], row["with"]) for row in probe.rules(model)}
    assert rules["numbered"] == (0, 1)
    assert rules["one_word"] == (1, 0)
    last = SimpleNamespace(
        answers=lambda chats, count: [chat[-2]["content"] if len(chat) > 1 else "" for chat in chats]
    )
    tasks = {(row["task"], row["examples"]): row["right"] for row in probe.tasks(last)}
    assert len(tasks) == len(probe.TASKS) * len(probe.SHOWN)
    assert tasks["kind", 8] == 0.25  # always the last example's answer, one of four
    assert set(tasks.values()) <= {0, 0.25, 1 / 16}
