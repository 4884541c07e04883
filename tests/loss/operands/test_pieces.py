"""A head in pieces: what several processes compute from their rows of it is what one computes from all of them."""

from __future__ import annotations

import pytest
import torch
from launches import in_group
from loss_cases import DIVERGENCES, LISTS, LOSSES, NEEDS
from pieces import Case, everything, of_processes
from torch import Tensor

SIZES = {"two": (6, 5), "three": (5, 2, 4)}
PADDED = (6, 5, 2)  # the last process has nothing but padding
MOST_ERROR = 1e-10


def cases() -> dict[str, Case]:
    found = {f"{name}-{key}": Case(name, {}, sizes) for name in LOSSES for key, sizes in SIZES.items()}
    return found


def test_as_the_whole_head() -> None:
    every = cases()
    results = in_group(of_processes, every, count=3)
    for key, case in every.items():
        compare(key, case, [result[key] for result in results[: len(case.sizes)]])


def compare(key: str, case: Case, parts: list[dict[str, Tensor]]) -> None:
    whole = everything(case.name, case.problem(), case.needs, **case.options)
    for part in parts:
        assert isinstance(part, dict), (key, part)
        assert part.keys() == whole.keys(), key
    for name, expected in whole.items():
        own = [part[name] for part in parts]
        if name in ("gradient weight", "gradient bias"):
            own = [torch.cat(own)]
        for one in own:
            torch.testing.assert_close(
                one, expected, rtol=MOST_ERROR, atol=MOST_ERROR, msg=lambda message: f"{key}, {name}: {message}"
            )
