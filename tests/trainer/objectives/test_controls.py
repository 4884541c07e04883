"""`loss.control`: whose scores a token gets, what is penalised, and that a run says that it is a control."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from groups import in_group
from hypothesis import given
from hypothesis import strategies as st
from run_cases import check_equal, distilled, interrupt, run
from run_settings import distillation

from fastkl.loss import TopK
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.arrays import Array, pieces
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.objectives.controls import lowest, shuffle_lists, turned, with_scores

LENGTHS = (3, 1, 2, 4, 2)


def parts(lengths: Sequence[int] = LENGTHS) -> list[Array]:
    return list(pieces(np.arange(sum(lengths), dtype=np.float32), lengths))


def numbers(found: Sequence[Array]) -> list[list[float]]:
    return [part.tolist() for part in found]


def named(names: str) -> list[Sample]:
    """Samples of data sets of one letter."""
    return [Sample([1], [True], 0, dataset=name, place=place) for place, name in enumerate(names)]


def test_scores_are_turned_by_half_within_a_data_set() -> None:
    found = turned(named("aaaaa"), parts())
    assert numbers(found) == [[6, 7, 8], [9], [10, 11], [0, 1, 2, 3], [4, 5]]
    assert numbers(turned(named("ababa"), parts())) == [[4, 5, 10], [7], [11, 0], [8, 9, 3, 6], [1, 2]]
    assert numbers(turned(named("a"), parts([3]))) == [[1, 2, 0]]
    assert turned([], []) == []


def test_nobody_keeps_a_score_unless_one_sample_is_most_of_the_step() -> None:
    own = [np.full(count, index) for index, count in enumerate(LENGTHS)]
    for index, (part, length) in enumerate(zip(turned(named("aaaaa"), own), LENGTHS, strict=True)):
        assert len(part) == length
        assert (part != index).all()


def test_the_lowest_of_all() -> None:
    values = [np.array([-1.0, -5.0], np.float32), np.array([-5.0, -0.1, -3.0], np.float32)]
    assert numbers(lowest(named("ab"), values, 0.2)) == [[False, True], [False, False, False]]
    assert numbers(lowest(named("ab"), values, 0.21)) == [[False, True], [True, False, False]]
    assert numbers(lowest(named("ab"), values, 1.0)) == [[True, True], [True, True, True]]


def of_share(rank: int, count: int) -> list[dict[int, tuple[list[float], list[float]]]]:
    """In several steps by place, what becomes of the values of the samples that are this process's."""
    steps = []
    for seed in range(6):
        random = np.random.default_rng(seed)
        lengths = random.integers(0, 5, random.integers(1, 9))
        owners = random.integers(0, 3, len(lengths)) % count
        samples = named("".join(random.choice(["a", "b"], len(lengths))))
        values = list(pieces(random.integers(-4, 1, lengths.sum()).astype(np.float32), lengths.tolist()))
        mine = [place for place, owner in enumerate(owners) if owner == rank]
        samples, own = [samples[place] for place in mine], [values[place] for place in mine]
        pairs = zip(numbers(turned(samples, own)), numbers(lowest(samples, own, 0.3)), strict=True)
        steps.append(dict(zip(mine, pairs, strict=True)))
    return steps


def test_processes_do_it_together() -> None:
    """In the order of the places, whoever has which."""
    found = in_group(of_share, count=3)
    assert [functools.reduce(operator.or_, parts) for parts in zip(*found, strict=True)] == of_share(0, 1)


@given(st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0]), max_size=12), st.floats(0.01, 1))
def test_the_lowest_as_sorting_has_them(values: list[float], share: float) -> None:
    wanted = np.zeros(len(values), bool)
    wanted[np.argsort(values, kind="stable")[: math.ceil(share * len(values))]] = True
    lengths = [len(values) // 2, len(values) - len(values) // 2]
    found = lowest(named("aa"), list(pieces(np.array(values, np.float32), lengths)), share)
    assert [*itertools.chain(*numbers(found))] == wanted.tolist()


def sample(ours: list[float], theirs: list[float], **fields: Any) -> Sample:
    made = Sample([0, *range(len(ours))], [False] + [True] * len(ours), 0, **fields)
    made.sampler_logprobs, made.teacher_logprobs = [0.0, *ours], [0.0, *theirs] if theirs else []
    return made


def advantages(samples: list[Sample], **config: Any) -> list[list[float]]:
    judged = with_scores(samples, LossConfig(**config))
    set_advantages(judged, LossConfig(**config))
    return [one.advantages[1:].tolist() for one in judged]


def test_shuffled_advantages_are_those_of_another_sample() -> None:
    """The reward stays, given completions stay, and so does what the metrics are made of."""
    samples = [
        sample([-1.0, -2.0], [-1.5, -4.0], reward_advantage=10.0),
        sample([-1.0], [-1.0], given=True),
        sample([-3.0, -1.0], [-1.0, -1.25]),
    ]
    assert advantages(samples) == [[9.5, 8.0], [1.0], [2.0, -0.25]]
    assert advantages(samples, control="shuffled") == [[12.0, 9.75], [1.0], [-0.5, -2.0]]
    assert [one.teacher_logprobs[1:].tolist() for one in samples] == [[-1.5, -4.0], [-1.0], [-1.0, -1.25]]


def test_without_a_teacher_the_unlikeliest_tokens_are_penalised() -> None:
    samples = [
        sample([-1.0, -2.0], [], reward_advantage=10.0),
        sample([-9.0], [], given=True),
        sample([-3.0, -1.0], [-7.0, -7.0]),
    ]
    options = {"control": "no_teacher", "control_share": 0.5, "control_penalty": 0.75}
    assert advantages(samples, **options) == [[10.0, 9.25], [1.0], [-0.75, 0.0]]
    assert advantages(samples, control="no_teacher") == [[10.0, 10.0], [1.0], [-0.5, 0.0]]


def test_lists_of_likeliest_tokens_are_shuffled() -> None:
    samples = [sample([-1.0] * count, [-2.0] * count) for count in (2, 1, 1)]
    rows = torch.arange(8).reshape(4, 2)
    for one, ids in zip(samples, rows.split([2, 1, 1]), strict=True):
        one.teacher_top_k = TopK(ids, -ids.float())
    shuffle_lists(samples)
    found = [one.teacher_top_k for one in samples if one.teacher_top_k is not None]
    assert torch.equal(torch.cat([own.ids for own in found]), rows[[2, 3, 0, 1]])
    assert all(torch.equal(own.logprobs, -own.ids.float()) for own in found)
    shuffle_lists([])


@pytest.mark.parametrize("options", [{}, {"loss__objective": "top_k"}], ids=["policy_gradient", "top_k"])
def test_a_shuffled_run_says_so_and_goes_on_where_it_was(
    options: dict[str, object],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"loss__control": "shuffled", "loss__weights": ["skip_first:1"], "checkpoint__every": 1, **options}
    whole = distilled(distillation(tmp_path / "whole", folder, **settings))
    said = capsys.readouterr().err
    assert "this run is a control (loss.control: shuffled)" in said
    assert "this run was a control" in said
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert json.dumps("a control (loss.control: shuffled)")[1:-1] in page
    broken = distillation(tmp_path / "broken", folder, **settings)
    interrupt(monkeypatch, broken, 2)
    distilled(broken)
    check_equal(tmp_path / "broken", whole)


def test_a_run_without_a_teacher_needs_none_and_reports_one_that_is_there(folder: Path, tmp_path: Path) -> None:
    options: dict[str, object] = {"loss__control": "no_teacher", "optim__steps": 1}
    alone = run(tmp_path / "alone", folder, teacher__path="", **options)
    beside = run(tmp_path / "beside", folder, **options)
    assert "teacher_kl" not in alone.metrics[0]
    assert beside.metrics[0]["teacher_kl"] > 0
    for name, parameter in alone.weights().items():
        assert torch.equal(beside.weights()[name], parameter)
    penalised = [value for one in alone.samples for value in one["advantages"] if value]
    assert penalised == pytest.approx([-0.5] * len(penalised), abs=1e-6)
    assert len(penalised) == -(-sum(sum(one["loss_mask"]) for one in alone.samples) // 5)


@pytest.mark.slow
@pytest.mark.parametrize("control", [None, "shuffled", "no_teacher"])
def test_only_a_teachers_own_scores_bring_a_student_nearer(folder: Path, tmp_path: Path, control: str | None) -> None:
    options: dict[str, object] = {"optim__steps": 15, "sampling__prompts_per_step": 24}
    options |= {} if control is None else {"loss__control": control}
    found = [row["teacher_kl"] for row in run(tmp_path / "run", folder, **options).metrics]
    assert (sum(found[-3:]) < 0.8 * sum(found[:3])) == (control is None)
    assert (sum(found[-3:]) > sum(found[:3])) == (control is not None)
