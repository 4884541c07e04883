"""Processes that share a head and are not given the same: all of them say what differs, none of them waits."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path

import given_apart
import pytest
import torch
from given_apart import VALUES
from groups import in_group

from fastkl import loss
from fastkl._loss.heads.agreement import LENGTH, TENSORS, differing, stated


@cache
def results() -> list[dict[tuple[str, str], str]]:
    return in_group(given_apart.errors)


def test_every_function_of_a_head_has_a_group() -> None:
    assert len(given_apart.functions()) >= 16
    assert all("group" in given_apart.parameters(function) for function in given_apart.functions().values())


def test_the_documents_have_every_function() -> None:
    """A row of the table each, which says whether it has a group."""
    text = (Path(__file__).parents[3] / "docs/losses/losses.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (`\w+`[^|]*) \| ([^|]*) \|", text.split("| function | `group=` |")[1].split("\n\n")[0], re.MULTILINE
    )
    said = {name: cell for names, cell in rows for name in re.findall(r"`(\w+)`", names)}
    functions = {name for name in loss.__all__ if inspect.isfunction(getattr(loss, name))}
    assert said.keys() == functions
    assert {name for name, cell in said.items() if cell.startswith("yes")} == given_apart.functions().keys()


def test_every_argument_is_compared() -> None:
    for call in given_apart.calls():
        for rank, result in enumerate(results()):
            assert f"ValueError: the processes of group were given different {call[1]}: " in result[call], (call, rank)
            assert " on process 0, " in result[call], call
            assert "process 1" in result[call], call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("policy_gradient_loss", "advantages"), "different advantages: -2 on process 0, -2.01 on process 1, at 3 of"),
        (("jsd_loss", "temperature"), "different temperature: 1 on process 0, 0 on process 1"),
        (("linear_top_k", "k"), "different k: 2 on process 0, 3 on process 1"),
        (("jsd_loss", "mask"), "different mask: 0 on process 0, 1 on process 1, at 3 of the flattened tensor"),
        (
            ("policy_gradient_loss", "old_logprobs"),
            "different old_logprobs: [4] of torch.float32 (cpu) on process 0, None",
        ),
        (("head", "no-tensor"), "different weight: [2] of torch.float32 (cpu) on process 0, (1) on process 1"),
        (("head", "hidden-size"), "different weight: [2] of / on process 0, [4] of"),
        (("head", "dtype"), "torch.float64 (cpu) on process 1"),
        (("head", "gradient"), "torch.float32 (cpu), with a gradient on process 1"),
        (("bias", "1"), "different numbers of rows of bias: those of weight on process 0, others on process 1"),
        (("bias", "2"), "different bias: [] of torch.float32 (cpu) on process 0, None on process 1"),
        (("grad mode", ""), "different grad mode: on on process 0, off on process 1"),
        (("function", ""), "different function: linear_logprobs on process 0, linear_cross_entropy on process 1"),
    ],
)
def test_what_is_said(call: tuple[str, str], message: str) -> None:
    for result in results():
        assert all(part in result[call] for part in message.split(" / ")), result[call]


def test_the_order_of_keywords_is_no_difference() -> None:
    assert [result["nothing", ""] for result in results()] == ["", ""]


def test_rounding_and_what_is_masked_may_differ() -> None:
    """And the rows that an argument leaves out may hold anything."""
    hidden, mask = torch.randn(64, 8), torch.arange(64) % 3 > 0
    advantages = torch.randn(64)
    given = {"hidden": hidden, "tokens": torch.arange(64), "advantages": advantages, "mask": mask}
    poisoned = {
        name: t.masked_fill(~mask.view(-1, *[1] * (t.dim() - 1)), torch.nan)
        for name, t in given.items()
        if t.is_floating_point()
    }
    rounded = {"hidden": hidden.bfloat16().float() + 0.0, "advantages": advantages * (1 + 1e-6)}
    own = stated("f", given, ())
    for other in (poisoned, rounded):
        assert differing(own, torch.tensor([own.numbers, stated("f", given | other, ()).numbers])) is None
    for name, other_tensor in {
        "hidden": hidden.roll(1, 0),
        "advantages": advantages.index_fill(0, torch.tensor([1]), 3.0),
    }.items():
        other_one = stated("f", given | {name: other_tensor}, ())
        assert differing(own, torch.tensor([own.numbers, other_one.numbers])) == name


def test_as_many_numbers_whatever_is_given() -> None:
    odd = {"hidden": [1.0], "tokens": torch.ones(2, device="meta"), "mask": torch.ones(2, dtype=torch.complex64)}
    odd |= {"temperature": torch.tensor(2.0), "weight": torch.empty(0, 3), "group": object(), "other": {1: 2}}
    many = {f"x{i}": torch.ones(i) for i in range(TENSORS + 3)}
    for given in (odd, many, {}):
        assert len(stated("f", given, ("weight",)).numbers) == LENGTH


def test_there_are_numbers_for_all_tensors_of_a_function() -> None:
    for function in given_apart.functions().values():
        tensors = [
            name for name in given_apart.parameters(function) & {*VALUES} if torch.Tensor in map(type, VALUES[name])
        ]
        assert 1 <= len(tensors) <= TENSORS


def test_every_value_is_of_an_argument() -> None:
    assert {*VALUES} == {given for _, given in given_apart.calls()}
