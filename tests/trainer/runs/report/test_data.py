"""What the report's page is made of: axes, series, samples and differences of runs, bounded in size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from report_cases import SETTINGS, make_run, only_run, page_of, row, sample
from tiny_data import write_jsonl
from tiny_models import tokenizer

from fastkl.trainer.config.training import DistillConfig, SftConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.report.curves import thin
from fastkl.trainer.runs.report.data import MAIN_SETTINGS, run_names
from fastkl.trainer.runs.report.page import SAMPLE_BYTES
from fastkl.trainer.runs.report.samples import spread


def test_several_runs_and_their_differences(tmp_path: Path) -> None:
    other = SETTINGS | {"optim": {"lr": 0.2, "steps": 3}, "student": {"path": "models/small", "lora": {"rank": 8}}}
    supervised = {"seed": 0, "student": SETTINGS["student"], "optim": SETTINGS["optim"], "examples_per_step": 5}
    runs = [
        make_run(tmp_path / "one" / "distill"),
        make_run(tmp_path / "two" / "distill", settings=other),
        make_run(tmp_path / "sft", rows=[row(1), row(2)], samples=[], settings=supervised),
    ]
    page = page_of(*runs[:2], output=tmp_path / "pages" / "two.html")
    assert [run["name"] for run in page.data["runs"]] == ["one/distill", "two/distill"]
    assert page.data["differences"] == ["optim.lr", "student.lora.rank"]
    page = page_of(*runs, output=tmp_path / "three.html")
    assert [run["name"] for run in page.data["runs"]] == ["one/distill", "two/distill", f"{tmp_path.name}/sft"]
    assert {"examples_per_step", "teacher.path"} <= set(page.data["differences"])
    assert page.data["runs"][2]["x"] == {"step": [1, 2], "tokens": [15, 30]}


def test_axes(tmp_path: Path) -> None:
    flops = {"flops/sampling": 1e12, "flops/teacher": 2e12, "flops/student": 3e12}
    start = {"step": 0, "eval/accuracy": 0.25}
    found = only_run(make_run(tmp_path / "run", rows=[start, row(1, **flops), row(2, **flops)]))
    assert found["x"] == {"step": [0, 1, 2], "tokens": [0, 24, 48], "flops": [0, 6e12, 12e12]}
    del flops["flops/teacher"]  # a served one: a total without it would flatter the run
    assert "flops" not in only_run(make_run(tmp_path / "served", rows=[start, row(1, **flops)]))["x"]
    assert found["series"]["eval/accuracy"] == {"at": [0], "values": [0.25]}
    assert found["series"]["loss"]["at"] == [1, 2]
    assert found["seconds"] == {"train": 1.0}


def test_changes_stand_where_they_were_made_on_each_axis(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=[{"step": 0, "eval/accuracy": 0.5}, row(1), row(2), row(3)])
    rows = [
        {"step": 2, "setting": "optim.lr", "was": 1e-4, "is": 5e-5},
        {"step": 2, "setting": "sampling.stop", "was": None, "is": ["x" * 500]},
        {"step": 9, "setting": "optim.steps", "was": 9, "is": 12},  # after what was logged
    ]
    strange = [{"step": "2", "setting": "seed", "was": 0, "is": 1}, {"step": 2}, 5]
    write_jsonl(run / "changes.jsonl", rows + strange)
    first, last = only_run(run)["changes"]
    assert (first["x"], last["x"]) == ({"step": 2, "tokens": 48}, {"step": 9, "tokens": 72})
    assert first["texts"][0] == "optim.lr: 0.0001 → 5e-05"
    assert len(first["texts"][1]) < 250
    assert last["texts"] == ["optim.steps: 9 → 12"]
    assert only_run(make_run(tmp_path / "steady"))["changes"] == []


OPTIONS = {"method": "ppo", "kl_coef": 1.0, "jsd_beta": 0.5, "skew_alpha": 0.1, "divergence_power": 1.0, "top_k": 20}


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("policy_gradient", ["method", "kl_coef"]),
        ("reverse_kl", []),
        ("jsd", ["jsd_beta"]),
        ("skewed_forward_kl", ["skew_alpha"]),
        ("density_power", ["divergence_power"]),
        ("top_k", ["top_k"]),
    ],
)
def test_the_settings_that_matter_name_the_objective(tmp_path: Path, objective: str, options: list[str]) -> None:
    """With its own options: those of others are in every config.yaml, and mean nothing."""
    settings = SETTINGS | {"loss": {"objective": objective, **OPTIONS}}
    main = only_run(make_run(tmp_path / "run", settings=settings))["main"]
    assert [name for name in main if name.startswith("loss.")] == [f"loss.{name}" for name in ("objective", *options)]
    assert {"student.path", "teacher.path", "optim.lr", "seed"} <= set(main)


def setting_names(config: type, prefix: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(config).items():
        groups = [part for part in (kind, *get_args(kind)) if is_dataclass(part)]
        yield from [f"{prefix}{name}"] if not groups else setting_names(groups[0], f"{prefix}{name}.")


def test_main_settings_are_settings() -> None:
    assert set(MAIN_SETTINGS) <= {*setting_names(DistillConfig), *setting_names(SftConfig)}


def test_lines_that_are_the_same_are_drawn_once(tmp_path: Path) -> None:
    def shown(*runs: Path) -> list[tuple[str, list[str], str]]:
        figures = page_of(*runs, output=tmp_path / "page.html").data["figures"]
        return [(one["name"], one["same"], one["unit"]) for one in figures if one["part"] == "learning"]

    def rows(off: float, scale: float = 1.0) -> list[dict[str, Any]]:
        return [row(step, teacher_kl=scale / step, loss=scale * (1 + off) / step) for step in range(1, 5)]

    kl = "nats per token"
    alike = make_run(tmp_path / "alike", rows=rows(1e-6))
    apart = make_run(tmp_path / "apart", rows=rows(0.01))
    assert shown(alike) == [("teacher_kl", ["loss"], kl)]
    assert shown(apart) == shown(alike, apart) == [("teacher_kl", [], kl), ("loss", [], "")]
    assert len(shown(make_run(tmp_path / "zero", rows=rows(0.0, scale=0.0)))) == 2
    without = make_run(tmp_path / "without", rows=[row(step) for step in range(1, 5)])
    assert len(shown(alike, without)) == 2
    wild = rows(1e-6)
    wild[1] |= {"teacher_kl": float("nan"), "loss": float("nan")}
    assert len(shown(make_run(tmp_path / "wild", rows=wild))) == 1
    many = [row(step, teacher_kl=3 / step, loss=(3 + 1e-5 * (step % 7)) / step) for step in range(1, 4000)]
    assert len(shown(make_run(tmp_path / "many", rows=many))) == 1


def test_an_interrupted_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", settings=SETTINGS | {"optim": {"steps": 100}})
    for file in ("metrics.jsonl", "samples.jsonl"):
        text = (run / file).read_text()
        (run / file).write_text(text[: -len(text.splitlines()[-1]) // 2 - 1])
    found = only_run(run)
    assert (found["steps_done"], found["steps_planned"]) == (2, 100)
    assert [shown["step"] for shown in found["samples"]["shown"]] == [1, 2]


def test_ranks_where_a_run_has_them(tmp_path: Path) -> None:
    ranked = sample(2, student_ranks=[0, 1, 3], teacher_ranks=[0, 250, 0])
    served = sample(3, student_ranks=[0, 1, 3], teacher_ranks=[])
    found = only_run(make_run(tmp_path / "run", samples=[sample(1), ranked, served]))["samples"]["shown"]
    assert [shown["student_ranks"] for shown in found] == [[], [1, 3], [1, 3]]
    assert [shown["teacher_ranks"] for shown in found] == [[], [250, 0], []]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    rows = [row(1, teacher_kl=float("nan")), row(2, teacher_kl=float("inf")), row(3, teacher_kl=0.5)]
    strange = sample(1, teacher_logprobs=[0.0, float("nan"), float("-inf")])
    found = only_run(make_run(tmp_path / "run", rows=rows, samples=[strange]))
    assert found["series"]["teacher_kl"]["values"] == ["nan", "inf", 0.5]
    assert found["samples"]["shown"][0]["teacher"] == ["nan", "-inf"]


def test_size_is_bounded_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    rows = [
        row(step, teacher_kl=(step * 7919) % 1000, **{f"m/{n}": n * step / 7 for n in range(20)})
        for step in range(4000)
    ]
    rows[1234]["teacher_kl"], rows[2345]["teacher_kl"] = 1e6, float("nan")
    samples = [sample(step, ["word "] * 1500) for step in range(100) for _ in range(10)]
    run = make_run(tmp_path / "run", rows=rows, samples=samples)
    page = page_of(run)
    (found,) = page.data["runs"]
    assert len(page.text) < SAMPLE_BYTES + 2_000_000
    assert {1e6, "nan"} <= set(found["series"]["teacher_kl"]["values"])
    shown = found["samples"]["shown"]
    assert (found["samples"]["count"], found["samples"]["steps"]) == (1000, 100)
    assert 10 < len(shown) < 320
    assert {0, 99} <= {one["step"] for one in shown}
    assert [(one["step"], one["number"]) for one in shown] == sorted((one["step"], one["number"]) for one in shown)


def test_points_and_steps_are_thinned_evenly() -> None:
    points = [(place, float(place % 10)) for place in range(10_000)]
    kept = thin(points, 600)
    assert len(kept) <= 602
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert max(after[0] - before[0] for before, after in itertools.pairwise(kept)) <= 100
    assert thin(points[:600], 600) == points[:600]
    assert spread(3, 5) == [0, 1, 2]
    assert spread(101, 5) == [0, 100, 50, 25, 75]
    assert len(set(spread(1000, 40))) == 40


def test_names_are_as_short_as_they_can_be() -> None:
    assert run_names([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert run_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
    with pytest.raises(ConfigError, match="named twice"):
        run_names([Path("runs/a"), Path("runs/../runs/a")])


def test_texts_of_tokens_without_a_record(tmp_path: Path) -> None:
    """From tokenizer.json alone: what else a folder wants to have run is not run."""
    words = tokenizer()
    ids = words("1+2")["input_ids"]
    bare = sample(1, "1+2")
    del bare["tokens"]
    known = make_run(tmp_path / "known", samples=[{**bare, "ids": ids}])
    words.save_pretrained(known / "student")
    trap = {"auto_map": {"AutoTokenizer": ["trap.Trap", None]}, "tokenizer_class": "Trap"}
    (known / "student" / "tokenizer_config.json").write_text(json.dumps(trap))
    (known / "student" / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    assert only_run(known)["samples"]["shown"][0]["tokens"] == ["1", "+", "2"]
    assert not (tmp_path / "sprung").exists()
    unknown = make_run(tmp_path / "unknown", samples=[{**bare, "ids": ids}])
    assert only_run(unknown)["samples"]["shown"][0]["tokens"] == [f"⟨{token}⟩" for token in ids]
