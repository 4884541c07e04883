"""A cache of teachers' scores: the same numbers with it and without, and no teacher where it has been asked before."""

from __future__ import annotations

import copy
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from launches import together
from property_settings import PROPERTY
from run_cases import check_same_weights, distilled, interrupt, log, refusal, refusals
from run_settings import Settings, arguments, config, distillation
from stub_server import StubServer, serving
from tiny_data import pair_and_sums
from tiny_models import llama, tokenizer

from fastkl import cli
from fastkl.head import fuse
from fastkl.trainer.config.teacher import TeacherConfig, TeacherServerConfig
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.teachers.cache import fingerprints
from fastkl.trainer.teachers.cache.store import NAME
from fastkl.trainer.teachers.cached import CachedTeacher, cached
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import connect
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Lists

CPU = torch.device("cpu")
WORDS = tokenizer()
NONE = Lists()
HITS, MISSES = "teacher_cache/hits", "teacher_cache/misses"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_and_sums(tmp_path_factory.mktemp("models"))


@pytest.fixture
def stub(folder: Path) -> Iterator[StubServer]:
    with serving(folder / "teacher") as server:
        server.scores_lists = True
        yield server


def samples() -> list[Sample]:
    rows = ([5, 6, 7], [8, 9, 10, 0]), ([5], [11, 12]), ([5, 6, 7], [8, 9, 10, 0]), ([6, 6, 8], [12, 13, 14])
    found = [make_sample(prompt, completion, index) for index, (prompt, completion) in enumerate(rows)]
    found[3].loss_mask[4] = False
    return found


def listing(samples: list[Sample], ids: int = 3) -> list[Sample]:
    for sample in samples:
        sample.student_top_k = torch.arange(20, 20 + ids).repeat(sample.loss_tokens, 1)
    return samples


def written(sample: Sample) -> list[Any]:
    lists = None if sample.teacher_top_k is None else [each.tolist() for each in sample.teacher_top_k]
    return [sample.teacher_logprobs.tolist(), sample.teacher_ranks.tolist(), lists]


def local(cache: Path | None, seed: int = 1, lists: Lists = NONE, temperature: float = 0.7, **more: Any) -> Any:
    """A teacher and its cache, which counts what it was asked in `asked`."""
    model = fuse(llama(len(WORDS), seed=seed, tie_word_embeddings=False).requires_grad_(False))
    options: dict[str, Any] = {"top_k": lists.teacher, "shared_only": lists.with_token, **more}
    teacher = LocalTeacher(model, "padded", 16384, temperature, CPU, **options)
    return counting(cached(settings(cache), teacher, lists, temperature) or teacher, teacher)


def settings(cache: Path | None, **more: Any) -> TeacherConfig:
    return TeacherConfig(path="t", cache=None if cache is None else str(cache), **more)


def counting(asked: Any, teacher: Any) -> Any:
    score, asked.asked = teacher.score, []

    def counted(samples: list[Sample]) -> None:
        asked.asked += samples
        score(samples)

    teacher.score = counted
    return asked


LISTS = {
    "none": Lists(),
    "teacher": Lists(teacher=3),
    "student": Lists(student=3),
    "both": Lists(teacher=3, student=3),
    "with token": Lists(teacher=3, with_token=True),
}


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_scores_are_the_teachers_to_the_bit(tmp_path: Path, lists: Lists) -> None:
    def asked() -> list[Sample]:
        return listing(samples()) if lists.student else samples()

    wanted = [sample for index, sample in enumerate(asked()) if index != 2]
    local(None, lists=lists).score(wanted)
    wanted.insert(2, wanted[0])
    for turn in range(3):
        found, teacher = asked(), local(tmp_path, lists=lists)
        teacher.score(found)
        assert list(map(written, found)) == list(map(written, wanted))
        assert [sample.teacher_cached for sample in found] == ([True] * 4 if turn else [False, False, True, False])
        assert len(teacher.asked) == (0 if turn else 3)


def test_ranks_and_plain_scores_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [samples(), samples()]
    for some in found:
        teacher = local(tmp_path)
        teacher.rank(some, 30)
        teacher.score_plain(some)
        monkeypatch.setattr(LocalTeacher, "_scatter", None)  # it could not be asked again
    assert [s.teacher_ranks.tolist() for s in found[0]] == [s.teacher_ranks.tolist() for s in found[1]]
    assert [s.plain_logprobs.tolist() for s in found[0]] == [s.plain_logprobs.tolist() for s in found[1]]
    assert all(any(s.teacher_ranks) and any(s.plain_logprobs) for s in found[1])


def moved(samples: list[Sample]) -> list[Sample]:
    samples[0].ids[0] = samples[2].ids[0] = 9
    return samples


def unmasked(samples: list[Sample]) -> list[Sample]:
    samples[3].loss_mask[4] = True
    return samples


OTHERS: dict[str, tuple[dict[str, Any], Callable[[list[Sample]], list[Sample]], int]] = {
    "same": ({}, list, 0),
    "temperature": ({"temperature": 0.7000001}, list, 3),
    "model": ({"seed": 2}, list, 3),
    "k": ({"lists": Lists(teacher=4)}, list, 3),
    "list": ({"lists": Lists(student=3)}, listing, 3),
    "listed ids": ({"lists": Lists(teacher=3, student=2)}, lambda some: listing(some, 2), 3),
    "common ids": ({"vocab_size": 40}, list, 3),
    "prompt": ({}, moved, 1),
    "tokens that count": ({}, unmasked, 1),
}


@pytest.mark.parametrize(("options", "change", "misses"), OTHERS.values(), ids=OTHERS)
def test_what_another_score_would_be_of_is_no_hit(
    tmp_path: Path, options: dict[str, Any], change: Callable[[list[Sample]], list[Sample]], misses: int
) -> None:
    local(tmp_path, lists=Lists(teacher=3)).score(samples())
    teacher, found = local(tmp_path, **{"lists": Lists(teacher=3), **options}), change(samples())
    teacher.score(found)
    assert len(teacher.asked) == misses
    alone = local(None, **{"lists": Lists(teacher=3), **options})
    for sample, again in zip(found, change(samples()), strict=True):
        alone.score([again])
        assert sample.teacher_logprobs == pytest.approx(again.teacher_logprobs, abs=1e-5)


def test_one_weight_in_its_last_bit_is_another_model(tmp_path: Path) -> None:
    local(tmp_path).score(samples())
    teacher = local(tmp_path)
    weight = teacher._teacher.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] += 1
    teacher.score(samples())
    assert len(teacher.asked) == 3


@PROPERTY
@given(st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.data())
def test_one_bit_of_a_weight_changes_its_hash(size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "WORDS", data.draw(st.sampled_from([1, 3, 2**22])))
        weight = torch.randn(size).mul(9).to(dtype)
        other = weight.clone()
        content = other.view(torch.uint8)
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        found = [fingerprints._hash(each) for each in (weight, weight.clone(), other)]
    words = weight.view(torch.uint8).tolist()
    words += [0] * (-len(words) % 8)
    numbers = [int.from_bytes(bytes(words[at : at + 8]), sys.byteorder) for at in range(0, len(words), 8)]
    wanted = sum((2 * at + 1) * 0x9E3779B97F4A7C15 * number for at, number in enumerate(numbers)) % 2**64
    assert found[:2] == [wanted, wanted]
    assert found[2] != wanted


def test_a_damaged_entry_is_scored_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = samples()
    local(tmp_path).score(wanted)
    with sqlite3.connect(tmp_path / NAME) as connection:
        contents = [row[0] for row in connection.execute("SELECT content FROM scores")]
        connection.execute("UPDATE scores SET content = ?", [contents[0]])  # well-formed, but of another sample
    connection.close()
    for misses in (2, 0):
        found, teacher = samples(), local(tmp_path)
        teacher.score(found)
        assert len(teacher.asked) == misses
        assert [s.teacher_logprobs for s in found] == [pytest.approx(s.teacher_logprobs, abs=1e-5) for s in wanted]
        assert ("damaged" in capsys.readouterr().err) == (misses > 0)


def connected(stub: StubServer, cache: Path, lists: Lists = NONE, **more: Any) -> Any:
    server = TeacherServerConfig(url=stub.url, model="stub", retries=1, recheck_every=0)
    options: dict[str, Any] = {"temperature": 1.0, "longest": [3] * 40, "remedy": "Do this", **more}
    config = TeacherConfig(server=server, cache=str(cache), tokenizer="t")
    teacher = connect(config, WORDS, top_k=lists.teacher, listed=lists.student, **options)
    return counting(cached(config, teacher, lists, options["temperature"]), teacher)


@pytest.mark.parametrize("lists", [Lists(), Lists(teacher=3), Lists(student=3)], ids=["none", "teacher", "student"])
def test_a_server_is_asked_once(tmp_path: Path, folder: Path, stub: StubServer, lists: Lists) -> None:
    first = listing(samples()) if lists.student else samples()
    connected(stub, tmp_path, lists).score(first)
    with serving(folder / "teacher") as other:  # somewhere else, but the same
        other.scores_lists = True
        again, teacher = listing(samples()) if lists.student else samples(), connected(other, tmp_path, lists)
        other.bodies.clear()
        teacher.score(again)
        assert other.bodies == []
    assert list(map(written, again)) == list(map(written, first))
    assert [sample.teacher_ranks.tolist() for sample in again] == [sample.teacher_ranks.tolist() for sample in first]


def nudge(stub: StubServer) -> None:
    stub.model = copy.deepcopy(stub.model)
    with torch.no_grad():
        stub.model.model.norm.weight.mul_(1.05)


def replace(stub: StubServer) -> None:
    stub.model = llama(stub.model.config.vocab_size, seed=5)


def rename(stub: StubServer) -> None:
    stub.told["/v1/models"] = {"data": [{"id": "stub", "root": "/models/new"}, {"id": "other"}]}


@pytest.mark.parametrize("change", [nudge, replace, rename])
def test_another_model_under_the_same_name_is_asked(
    tmp_path: Path, stub: StubServer, change: Callable[[StubServer], None]
) -> None:
    connected(stub, tmp_path).score(samples())
    change(stub)
    teacher, found = connected(stub, tmp_path), samples()
    teacher.score(found)
    assert [sample.teacher_cached for sample in found] == [False, False, True, False]
    again = connected(stub, tmp_path)
    again.score(samples())
    assert again.asked == []


def test_scores_of_a_server_that_has_changed_are_not_kept(tmp_path: Path, stub: StubServer) -> None:
    teacher, own = connected(stub, tmp_path), stub.model
    replace(stub)
    with pytest.raises(ServerError, match="is not what it was when the run began"):
        teacher.score(samples())
    stub.model = own
    again = connected(stub, tmp_path)
    again.score(samples())
    assert len(again.asked) == 3


def test_flops_count_what_was_computed(tmp_path: Path) -> None:
    asked: CachedTeacher = local(tmp_path)
    teacher: Any = asked._teacher
    routed = RoutedTeacher({"": teacher}, caches={"": asked})
    found = [samples(), samples()]
    for some in found:
        routed.score(some)
    computed = [some for index, some in enumerate(found[0]) if index != 2]
    assert routed.flops(found[0]) == teacher.flops(computed)
    assert routed.flops(found[1]) == {"flops/teacher": 0.0}


RUNS: dict[str, Settings] = {
    "lists": {"loss__objective": "top_k", "loss__top_k_of": "both", "loss__top_k": 4},
    "given": {"sampling__on_policy_fraction": 0.5},
    "context": {"teacher__context__template": "{prompt} {answer}", "optim__substeps": 2},
    "forward kl": {"loss__forward_kl_above": 0.1, "loss__forward_kl_top_k": 4},
}


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, marks=[pytest.mark.slow] * (name != "lists"), id=name) for name, options in RUNS.items()],
)
def test_a_run_with_a_cache_is_the_run_without(
    tmp_path: Path, folder: Path, options: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another with what that has left needs no teacher. No completion comes twice: other batches round otherwise."""
    options = {"optim__steps": 2, **options}
    runs = [tmp_path / name for name in ("alone", "first", "second")]
    cache = {"teacher__cache": tmp_path / "cache"}
    distilled(distillation(runs[0], folder, **options))
    distilled(distillation(runs[1], folder, **options, **cache))
    monkeypatch.setattr(LocalTeacher, "_scatter", None)  # it could not be asked
    distilled(distillation(runs[2], folder, **options, **cache))
    for run in runs[1:]:
        check_same_weights(run, runs[0])
        assert (run / "samples.jsonl").read_bytes() == (runs[0] / "samples.jsonl").read_bytes()
    first, second = map(log, runs[1:])
    assert sum(row[MISSES] for row in first) > 0
    assert [row[HITS] for row in second] == [row[HITS] + row[MISSES] for row in first]
    assert {(row[MISSES], row["flops/teacher"]) for row in second} == {(0, 0)}


def test_a_run_that_goes_on_reads_what_it_had_scored(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Settings = {"checkpoint__every": 2, "teacher__cache": tmp_path / "cache"}
    options |= {"loss__objective": "top_k", "sampling__on_policy_fraction": 0}
    whole = distilled(distillation(tmp_path / "whole", folder, **options))
    options["teacher__cache"] = tmp_path / "other"
    run = distillation(tmp_path / "run", folder, **options)
    interrupt(monkeypatch, run, 2)
    elsewhere = run | {"teacher.cache": tmp_path / "cache", "teacher.cache_gigabytes": 1}  # which is no other run
    distilled(elsewhere)
    assert [(row[HITS], row[MISSES]) for row in log(whole)] == [(0, 6), (0, 6), (6, 0)]  # of 12 rows
    assert [row[MISSES] for row in log(tmp_path / "run")] == [6, 6, 0]
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_teachers_of_a_mixture_share_a_cache(tmp_path: Path, folder: Path) -> None:
    entries = {
        name: {
            "data": {"path": str(folder / "sums.jsonl")},
            "teacher": {"path": str(folder / of), **({"cache": str(tmp_path / "cache")} if name != "c" else {})},
        }
        for name, of in (("a", "teacher"), ("b", "student"), ("c", "teacher"))
    }
    alone: Settings = {"teacher__path": "", "data__path": "null", "mixture": json.dumps(entries)}
    rows = [log(distilled(distillation(tmp_path / name, folder, **alone, optim__steps=1)))[0] for name in "xy"]
    asked = rows[0][HITS] + rows[0][MISSES]
    assert asked == 4  # those of a and b
    assert (rows[1][HITS], rows[1][MISSES]) == (asked, 0)
    assert rows[1]["teacher_kl"] == rows[0]["teacher_kl"]
    assert 0 < rows[1]["flops/teacher"] < rows[0]["flops/teacher"]


def test_the_base_of_a_lora_student(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights stay while the adapter moves."""
    options: Settings = {"teacher__path": "", "teacher__self": "base", "student__lora__rank": 2, "optim__lr": 0.1}
    options |= {"reward__grader": "regex:[0-4]$", "reward__baseline": "none", "teacher__cache": tmp_path / "cache"}
    options["optim__steps"] = 2
    first = distilled(distillation(tmp_path / "first", folder, **options))
    monkeypatch.setattr(LocalTeacher, "_scatter", None)
    second = distilled(distillation(tmp_path / "second", folder, **options))
    assert (first / "samples.jsonl").stat().st_size > 0
    assert [row[MISSES] for row in log(second)] == [0, 0]
    assert [row["teacher_kl"] for row in log(second)] == [row["teacher_kl"] for row in log(first)]


def test_score_reads_and_fills_it(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scored(name: str, **more: object) -> bytes:
        options = {"model.path": folder / "teacher", "data.path": folder / "sums.jsonl", "output": tmp_path / name}
        assert cli.main(arguments("score", options | more)) == 0
        return (tmp_path / name).read_bytes()

    cache = {"model.cache": tmp_path / "cache"}
    assert scored("a") == scored("b", **cache) == scored("c", **cache)
    said = capsys.readouterr().err
    assert f"12 completions had scores in {tmp_path / 'cache'}" in said
    scored("d", **cache, temperature=0.5)
    assert "0 completions had scores" in capsys.readouterr().err


REFUSED = [
    ({"teacher.cache": "c", "loss.objective": "reverse_kl"}, ["teacher.cache is 'c'", "reverse_kl, which reads whole"]),
    ({"teacher.cache": "c", "loss.baseline": "kl"}, ["teacher.cache is 'c'", "loss.baseline is kl, which reads whole"]),
    ({"teacher.cache": " "}, ["teacher.cache is empty"]),
    ({"teacher.cache": "c", "teacher.cache_gigabytes": 0}, ["teacher.cache_gigabytes is 0", "> 0"]),
    ({"teacher.cache_gigabytes": 3}, ["teacher.cache_gigabytes is 3", "teacher.cache is null"]),
]


@pytest.mark.parametrize(("command", "changes", "parts"), refusals("distill", REFUSED))
def test_refused_settings(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], command: str, changes: Settings, parts: list[str]
) -> None:
    refusal(capsys, command, distillation(tmp_path / "run", folder) | changes, *parts)


@pytest.mark.parametrize(
    "kind", [{"self": "live"}, {"self": "ema", "ema_rate": 0.1}, {"self": "synced", "sync_every": 2}]
)
def test_a_teacher_that_moves_has_none(tmp_path: Path, folder: Path, kind: dict[str, Any]) -> None:
    own = {f"teacher.{name}": value for name, value in kind.items()}
    run = distillation(tmp_path / "run", folder) | {"teacher.path": "", "teacher.cache": "c", **own}
    with pytest.raises(
        ConfigError, match=f"teacher.cache is 'c', but teacher.self is {kind['self']}: its weights move"
    ):
        config("distill", run)


def test_a_folder_that_cannot_be_written_is_refused_early(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    run = distillation(tmp_path / "run", folder, teacher__cache=tmp_path / "file")
    refusal(capsys, "distill", run, "teacher.cache", "cannot be written", "name another folder, or unset it")


@pytest.mark.slow
def test_processes_of_a_run_share_it(tmp_path: Path, folder: Path) -> None:
    options: Settings = {"teacher__path": "", "teacher__self": "base", "student__lora__rank": 2, "optim__steps": 2}
    options |= {"reward__grader": "regex:[0-4]$", "reward__baseline": "none", "teacher__cache": tmp_path / "cache"}
    for name in ("first", "second"):
        line = arguments("distill", distillation(tmp_path / name, folder, **options))
        codes, said = together(line, tmp_path / "said")
        assert codes == [0, 0], "\n".join(said)
    first, second = (log(tmp_path / name) for name in ("first", "second"))
    assert [row[HITS] + row[MISSES] for row in first] == [6, 6]
    assert [(row[HITS], row[MISSES], row["flops/teacher"]) for row in second] == [(6, 0, 0)] * 2
    assert [row["teacher_kl"] for row in second] == [row["teacher_kl"] for row in first]
