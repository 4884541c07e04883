"""`fastkl plan`: memory, FLOPs and hours of a run that need not be possible here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_settings import arguments, distillation, training
from segment_cases import OWN, strangers, words
from tiny_data import read_jsonl
from tiny_models import save_model

from fastkl import cli
from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.commands.plan import sizes
from fastkl.trainer.commands.plan.advice import advice
from fastkl.trainer.commands.plan.assumed import planned
from fastkl.trainer.commands.plan.devices import DEVICES
from fastkl.trainer.commands.plan.hours import durations
from fastkl.trainer.commands.plan.parts import Memory
from fastkl.trainer.config.offline import DistillPlan, SftPlan

ROOT = Path(__file__).parents[3]
GIB = 2**30


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Models of which only config.json is there, and no data."""
    for name in ("student", "teacher"):
        save_model(tmp_path / name, layers=2, width=32, vocabulary=500)
        for file in (tmp_path / name).iterdir():
            if file.name != "config.json":
                file.unlink()
    return tmp_path


def plan(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["plan", *words]) == 0
    return capsys.readouterr().out


def settings(folder: Path, **more: object) -> list[str]:
    return arguments("plan", distillation(folder / "run", folder, **more) | {"data.path": folder / "none.jsonl"})[1:]


def of(folder: Path, **more: object) -> Any:
    return parse(["plan", *settings(folder, **more)])[1]


def test_config_json_is_enough(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(bare.rglob("*"))
    text = plan(settings(bare, data__max_prompt_tokens=20), capsys)
    for word in ("prompts of 20 tokens each, for the data could not be read", "H200", "none of this was measured"):
        assert word in text
    for word in ("the student's weights", "Adam's two moments", "keys and values", "it fits", "in all;", "FLOPs"):
        assert word in text
    assert "Python and libraries" not in text
    assert sorted(bare.rglob("*")) == before


def test_data_that_are_here_are_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(arguments("plan", distillation(tmp_path / "run", folder))[1:], capsys)
    assert "12 prompts of 6 to 9 tokens, 7 on average" in text
    assert "could not be read" not in text


def test_fine_tuning_is_known_by_its_settings(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments("plan", training(tmp_path / "run", folder))[1:]
    assert isinstance(parse(["plan", *words])[1], SftPlan)
    assert isinstance(parse(["plan", *words, "--teacher.path", "t"])[1], DistillPlan)
    text = plan([*words, "--device", "cpu"], capsys)
    assert "the student's update" in text
    assert "Python and libraries" in text
    assert "hours" not in text.partition("data ")[2]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--student.path", "no/such/model"],
            ["student: model path", "no config.json", "--student.path FOLDER"],
        ),
        (["--processes", "0"], ["processes is 0"]),
        (["--flops_share", "1.5"], ["flops_share is 1.5"]),
        (["--device", "abacus"], ["device is 'abacus'", "h200"]),
        (["--accelerate", "none.yaml"], ["accelerate is 'none.yaml', which cannot be read"]),
        (["--examples_per_step", "4"], ["it belongs to fastkl sft"]),
    ],
    ids=str,
)
def test_refusals(words: list[str], parts: list[str], bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *settings(bare), *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert [part for part in parts if part not in error] == [], error


def test_other_launchers_are_refused(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bare / "a.yaml").write_text("distributed_type: DEEPSPEED\nnum_processes: 4\n", encoding="utf-8")
    assert cli.main(["plan", *settings(bare), "--accelerate", str(bare / "a.yaml")]) == 2
    assert "DEEPSPEED; this trainer knows DDP and FSDP 2" in capsys.readouterr().err


def test_shares_of_processes(bare: Path) -> None:
    """FSDP 2 shares out weights, gradients and moments; DDP adds buckets. The samples are shared by both."""
    fsdp = str(ROOT / "recipes/accelerate/fsdp2.yaml")
    one, ddp, sharded = (
        planned(of(bare, **more)).run for more in ({}, {"processes": 4}, {"processes": 4, "accelerate": fsdp})
    )
    assert (ddp.processes.sharded, sharded.processes.sharded) == (False, True)
    assert planned(of(bare, accelerate=fsdp)).run.processes.count == 2  # the file's own

    def part(run: Any, name: str) -> float:
        return next(part.bytes or 0 for part in Memory(run).always if part.name.startswith(name))

    for name in ("the student's weights", "Adam's two moments"):
        assert part(one, name) == part(ddp, name) == 4 * part(sharded, name)
    assert part(ddp, "DDP's buckets") == sizes.gradients(ddp.student)
    assert part(one, "the weights of teacher") == part(sharded, "the weights of teacher")
    gathered = [each.name for phase in Memory(sharded).phases for each in phase.parts]
    assert "the gathered student" in gathered
    assert "gathered weights" in gathered


def test_hours_are_flops_over_the_assumed_rate(bare: Path) -> None:
    config = of(bare, device="a100", flops_share=0.5, mixed_precision="bf16")
    run = planned(config).run
    found = {phase.name: phase.hours for phase in durations(run, config)}
    from fastkl.trainer.commands.plan.work import UPDATE, work

    flops = {each.name: each.flops for each in work(run)}
    assert found[UPDATE] == pytest.approx(flops[UPDATE] / (0.5 * DEVICES["a100"].half * 1e12) / 3600)
    again = of(bare, device="a100", flops_share=0.5, mixed_precision="bf16", processes=2)
    assert {p.name: p.hours for p in durations(planned(again).run, again)}[UPDATE] == pytest.approx(found[UPDATE] / 2)
    assert list(durations(run, of(bare, device="cpu"))) == []


def test_shorter_completions_cost_less_and_take_the_same_memory(bare: Path) -> None:
    long, short = (of(bare, data__max_prompt_tokens=4, **more) for more in ({}, {"mean_tokens": 2}))
    times = [sum(phase.hours for phase in durations(planned(config).run, config)) for config in (long, short)]
    assert times[0] > 1.3 * times[1]
    assert Memory(planned(long).run).peak == Memory(planned(short).run).peak


def test_advice_is_in_order_and_each_lowers_the_peak(bare: Path) -> None:
    more = {"sampling__prompts_per_step": 64, "batch__max_tokens": 4096, "sampling__max_requests": 1}
    run = planned(of(bare, **more)).run
    peak = Memory(run).peak
    changes = list(advice(run, 1.0))
    assert changes
    assert changes[0].words.startswith("batch.max_tokens")
    peaks = [peak, *(change.peak for change in changes)]
    assert peaks == sorted(peaks, reverse=True)
    assert len({*peaks}) == len(peaks)
    assert list(advice(run, peak)) == []
    assert len(list(advice(run, changes[0].peak))) == 1


def test_whole_students_are_sharded_before_there_are_more_of_them(bare: Path) -> None:
    """DDP's two processes go on as two with FSDP 2. Where there is one process, or they have shards, it takes more."""
    save_model(bare / "student", layers=4, width=256)  # its weights are most of the peak
    fsdp = {"accelerate": str(ROOT / "recipes/accelerate/fsdp2.yaml")}
    for more, count in (({}, 2), ({"processes": 2}, 2), ({"processes": 2, **fsdp}, 4)):
        run = planned(of(bare, sampling__prompts_per_step=64, **more)).run
        least = list(advice(run, 1.0))[-1].peak
        assert f"FSDP 2 on {count} processes" in list(advice(run, 0.98 * least))[-1].words


TRAINING = [
    path
    for path in sorted((ROOT / "recipes").glob("*/**/*.yaml"))
    if "run" in yaml.safe_load(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("config", TRAINING, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_of_the_recipes_is_taken(config: Path) -> None:
    kind = parse(["plan", str(config)])[1]
    distils = not {"teacher", "sampling", "reward"}.isdisjoint(yaml.safe_load(config.read_text(encoding="utf-8")))
    assert isinstance(kind, DistillPlan if distils else SftPlan)


def test_a_teachers_own_tokens_are_counted(tmp_path: Path) -> None:
    """As many more as the data's texts have: characters and two of them at a time."""
    pair = strangers(tmp_path, "pairs", "characters")
    config = parse(arguments("plan", distillation(tmp_path / "run", pair, **OWN)))[1]
    found = planned(config)
    texts = [row["completion"] for row in read_jsonl(pair / "sums.jsonl")]
    growth = sum(map(len, texts)) / sum(len(words("pairs")(text)["input_ids"]) for text in texts)
    assert growth > 1
    (said,) = (line for line in found.assumed if "reads" in line)
    assert f"{growth:.2f} in completions" in said
    (scorer,), sample = found.run.scorers, found.run.samples[0]
    read = scorer.read([sample])[0]
    assert read.completion_length == read.loss_tokens == math.ceil(growth * sample.completion_length)
    assert read.prompt_length > sample.prompt_length
    for file in (pair / "teacher").glob("tokenizer*"):
        file.unlink()
    assert any("reads as many tokens as the student, for its tokenizer" in line for line in planned(config).assumed)
    (pair / "sums.jsonl").unlink()
    assert any("for there are no texts to compare" in line for line in planned(config).assumed)
