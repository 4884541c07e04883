"""Samples of several processes: who has which, what travels, and numbers that are found without travelling."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from groups import in_group
from hypothesis import given
from hypothesis import strategies as st
from run_cases import fields

from fastkl.loss import TopK
from fastkl.trainer.data.samples import ARRAYS, Sample
from fastkl.trainer.runs.sharing.mismatch import mismatch_metrics
from fastkl.trainer.runs.sharing.ranked import quantile, ranked
from fastkl.trainer.runs.sharing.records import Record, by_first, gather, gather_arrays, move, pack, sum_arrays, unpack
from fastkl.trainer.runs.sharing.samples import as_record, as_sample, first_samples, lent, move_samples
from fastkl.trainer.runs.sharing.shares import balanced, share_out, shares

WORK = st.lists(st.integers(0, 10**15), min_size=1, max_size=30)
FLOATS = st.floats(width=32, allow_nan=False)


def loads(work: list[int], owners: list[int], count: int) -> list[int]:
    return [sum(size for size, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(count)]


@given(WORK, st.integers(1, 6), st.data())
def test_nothing_smaller_makes_shares_more_even(work: list[int], count: int, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, count - 1), min_size=len(work), max_size=len(work)))
    found = balanced(work, owners, count)
    before, after = loads(work, owners, count), loads(work, found, count)
    busiest = after.index(max(after))
    own = [size for size, owner in zip(work, found, strict=True) if owner == busiest and size]
    assert max(after) - min(after) <= min(own, default=0)
    assert max(after) <= max(before)
    assert balanced(work, found, count) == found


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3), st.data())
def test_the_busiest_is_at_most_so_much_busier_than_it_must(work: list[int], count: int, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, count - 1), min_size=len(work), max_size=len(work)))
    least = min(max(loads(work, list(each), count)) for each in itertools.product(range(count), repeat=len(work)))
    assert max(loads(work, balanced(work, owners, count), count)) <= (2 - 2 / (count + 1)) * least


@given(WORK, st.integers(1, 4), st.integers(1, 4))
def test_each_optimizer_step_is_shared_out_by_itself(work: list[int], count: int, substeps: int) -> None:
    owners = [place * count // len(work) for place in range(len(work))]
    found = shares(work, owners, count, substeps)
    for first in range(substeps):
        assert found[first::substeps] == balanced(work[first::substeps], owners[first::substeps], count)


def test_few_samples_move_where_shares_are_nearly_even() -> None:
    random = np.random.default_rng(0)
    work = (random.lognormal(7, 1, 2048) * 1e12).tolist()
    owners = [place * 8 // len(work) for place in range(len(work))]
    found = balanced(work, owners, 8)
    assert sum(a != b for a, b in zip(found, owners, strict=True)) < 0.02 * len(work)
    assert max(loads(work, found, 8)) < 1.001 * sum(work) / 8


def sample(random: np.random.Generator, place: int, **more: Any) -> Sample:
    """With numbers in arrays of each dtype, lists and text."""
    length, counted = int(random.integers(2, 9)), int(random.integers(0, 2))
    made = Sample(random.integers(0, 99, length), random.random(length) < 0.6, int(random.integers(9)), place=place)
    for name in ("sampler_logprobs", "weights", "teacher_prompt")[counted:]:
        setattr(made, name, random.random(length) * 9)
    k = int(random.integers(0, 3))
    ids = torch.from_numpy(random.integers(0, 99, (made.loss_tokens, k), np.int32))
    made.teacher_top_k = TopK(ids, -ids.float()) if counted else None
    made.student_top_k = None if counted else ids
    made.feedback = "ä" * length
    return dataclasses.replace(made, **more)


def plain(own: Sample) -> dict[str, Any]:
    """All of a sample, in what == understands."""
    found = fields(own)
    found["student_top_k"] = None if own.student_top_k is None else own.student_top_k.tolist()
    found["teacher_top_k"] = None if own.teacher_top_k is None else [part.tolist() for part in own.teacher_top_k]
    return found


@given(st.integers(0, 2**32))
def test_a_sample_is_the_same_after_its_way(seed: int) -> None:
    random = np.random.default_rng(seed)
    samples = [sample(random, place) for place in range(3)]
    found = list(map(as_sample, unpack(*pack(list(map(as_record, samples))))))
    assert list(map(plain, found)) == list(map(plain, samples))
    for own in found:
        arrays = {name: getattr(own, name) for name in ARRAYS if getattr(own, name) is not None}
        assert {name: array.dtype for name, array in arrays.items()} == {name: ARRAYS[name] for name in arrays}
        assert all(array.flags.aligned for array in arrays.values())
        assert own.student_top_k is None or own.student_top_k.dtype == torch.int32


@given(st.lists(FLOATS, min_size=1, max_size=40), st.data())
def test_ranks_as_sorting_has_them(values: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    assert ranked(np.array(values, np.float32), [rank, 0]).tolist() == [np.sort(values)[rank], min(values)]


@pytest.mark.parametrize("count", [1, 2, 20, 21, 1000])
def test_a_quantile_is_that_of_torch(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).abs()
    assert quantile(values.numpy(), 0.95) == pytest.approx(values.double().quantile(0.95).item(), rel=1e-6)


def test_a_mismatch_of_no_tokens_is_none() -> None:
    assert mismatch_metrics([]) == {}
    found = mismatch_metrics([torch.tensor([[-1.0, -1.0], [-1.5, -1.0]]), torch.tensor([[-0.95, -1.0]])])
    assert found["sampler_mismatch/mean_abs"] == pytest.approx(0.55 / 3)
    assert found["sampler_mismatch/outside_0.9_1.1"] == pytest.approx(1 / 3)


def everyones(seed: int) -> tuple[list[Sample], list[int], list[int]]:
    """Samples with places that are not 0, 1, 2, …; the processes that have them, and others."""
    random = np.random.default_rng(seed)
    places = sorted(random.choice(30, int(random.integers(0, 9)), replace=False).tolist())
    owners, others = random.integers(0, 3, (2, len(places)))
    if seed % 3 == 0:
        owners[:] = 1  # as from a server, but not the first
    return [sample(random, place) for place in places], owners.tolist(), others.tolist()


def as_each_sees_it(rank: int, count: int) -> list[dict[str, Any]]:
    return [seen(rank, *everyones(seed)) for seed in range(4)]


def seen(rank: int, samples: list[Sample], owners: list[int], others: list[int]) -> dict[str, Any]:
    """What every function gives a process that has its samples alone."""
    chosen = [index for index, owner in enumerate(owners) if owner == rank]
    mine, to = [samples[index] for index in chosen], [others[index] for index in chosen]
    values = np.array([0.5 * own.ids[0] - 9 for own in mine], np.float32)
    told = [Record(own.place, [own.ids]) for own in mine]
    have = [rank in owners for rank in range(3)]
    found: dict[str, Any] = {
        "moved": [record.head for record in move(told, to)],
        "samples": list(map(plain, move_samples(mine, to))),
        "gathered": [record.head for record in gather(told)],
        "arrays": [part.tolist() for part in gather_arrays(values)],
        "sum": sum_arrays(np.array([len(mine), 1])).tolist(),
        "answers": [record.arrays[0].tolist() for record in by_first(told, [own.place for own in mine], doubled)],
        "ranked": ranked(values, range(len(samples))).tolist() if samples else [],
        "lent": getattr(lent(mine[0] if mine else None, have), "place", None),
        "first": [own.place for own in first_samples(mine, 15)],
    }
    found["shared"] = list(map(plain, share_out(mine, [len(own.ids) for own in mine], 2)))
    return found


def doubled(records: list[Record]) -> list[Record]:
    """Twice the ids, and how many records were before."""
    assert [record.head for record in records] == sorted(record.head for record in records)
    return [Record(None, [np.append(2 * record.arrays[0], index)]) for index, record in enumerate(records)]


def test_what_travels_between_three_processes() -> None:
    found = in_group(as_each_sees_it, count=3)
    for seed in range(4):
        samples, owners, others = everyones(seed)
        each = [parts[seed] for parts in found]
        of = [[own for own, owner in zip(samples, owners, strict=True) if owner == rank] for rank in range(3)]
        values = [[0.5 * own.ids[0] - 9 for own in part] for part in of]
        with_target = [(own, owner, target) for own, owner, target in zip(samples, owners, others, strict=True)]
        for rank in range(3):
            coming = sorted((t for t in with_target if t[2] == rank), key=lambda t: t[1])
            assert each[rank]["moved"] == [own.place for own, _, _ in coming]
            assert sorted(own["place"] for own in each[rank]["samples"]) == sorted(own.place for own, _, _ in coming)
            assert all(own in map(plain, samples) for own in each[rank]["samples"])
            assert each[rank]["gathered"] == [own.place for part in of for own in part]
            assert each[rank]["arrays"] == values
            assert each[rank]["sum"] == [len(samples), 3]
            index = {id(own): index for index, own in enumerate(samples)}
            assert each[rank]["answers"] == [[*(2 * own.ids).tolist(), index[id(own)]] for own in of[rank]]
            assert each[rank]["ranked"] == sorted(itertools.chain(*values))
            lender = next((part for part in of if part), [None])[0]
            assert each[rank]["lent"] == getattr((of[rank] or [lender])[0], "place", None)
            assert each[rank]["first"] == ([own.place for own in samples if own.place < 15] if rank == 0 else [])
        owners = shares([len(own.ids) for own in samples], owners, 3, 2)
        for place, own in enumerate(samples):
            own.place = place
            assert plain(own) in each[owners[place]]["shared"]
        assert sum(len(own["shared"]) for own in each) == len(samples)
        assert all(
            [own["place"] for own in parts["shared"]] == sorted(own["place"] for own in parts["shared"])
            for parts in each
        )
