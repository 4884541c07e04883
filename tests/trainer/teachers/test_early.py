"""A served teacher that is asked while completions arrive: the same scores, fewer waits, the same errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_cases import check_equal, distilled
from run_settings import Settings, distillation
from server_cases import served
from stub_server import StubServer, serving
from stub_vllm import StubVllm

from fastkl.trainer.errors import ServerError
from fastkl.trainer.teachers.early import Early
from fastkl.trainer.teachers.served import ServedTeacher


class Slow:
    """Answers with ten times the number, when it is let."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.gate = threading.Semaphore(0)

    def ask(self, numbers: Sequence[int]) -> list[int]:
        self.asked.append(list(numbers))
        assert self.gate.acquire(timeout=10)
        if 7 in numbers:
            raise ServerError("gone")
        return [10 * number for number in numbers]


def test_what_waits_shares_a_request() -> None:
    slow = Slow()
    early = Early(slow.ask, most=3, concurrency=1)
    for number in (0, 1, 2, 3, 4, 1):
        early.add(number, number)
        while not slow.asked:
            time.sleep(0.001)
    slow.gate.release(3)
    answers = [early.find(number) for number in range(5)]
    assert [answer.result(10) for answer in answers if answer] == [0, 10, 20, 30, 40]
    assert slow.asked == [[0], [1, 2, 3], [4]]
    assert early.find(9) is None
    early.forget(range(5))
    assert early.find(4) is None


def test_an_error_is_raised_by_who_waits_and_the_next_may_be_asked() -> None:
    slow = Slow()
    early = Early(slow.ask, most=1, concurrency=2)
    slow.gate.release(9)
    early.add("a", 7)
    early.add("b", 8)
    first, second = early.find("a"), early.find("b")
    assert first is not None
    assert second is not None
    with pytest.raises(ServerError, match="gone"):
        first.result(10)
    assert second.result(10) == 80


def test_closed_it_asks_nothing_more() -> None:
    slow = Slow()
    early = Early(slow.ask, most=1, concurrency=1)
    early.add(0, 0)
    early.add(1, 1)
    while not slow.asked:
        time.sleep(0.001)
    early.close()
    slow.gate.release(9)
    while early._threads:
        time.sleep(0.001)
    assert slow.asked == [[0]]


@pytest.fixture
def stubs(folder: Path) -> Iterator[tuple[StubVllm, StubServer]]:
    with serving(folder / "student", kind=StubVllm) as sampling, serving(folder / "teacher") as teacher:
        yield sampling, teacher


def settings(run: Path, folder: Path, stubs: tuple[StubVllm, StubServer], **more: object) -> Settings:
    servers = served("sampling", stubs[0], concurrency=1) | served("teacher", stubs[1], sequences_per_request=2)
    small = {"sampling__steps_ahead": 1, "optim__steps": 2}
    return distillation(run, folder, **small, **servers, **more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"sampling__drop_truncated": True, "sampling__tokens_per_step": 3}, marks=pytest.mark.slow),
        pytest.param({"teacher__context__system": "Add"}, marks=pytest.mark.slow),
        pytest.param({"loss__objective": "top_k", "loss__top_k": 2}, marks=pytest.mark.slow),
        pytest.param({"environment__name": "calculator"}, marks=pytest.mark.slow),
    ],
)
def test_the_teacher_is_asked_once_about_each_and_before_the_last_has_come(
    tmp_path: Path,
    folder: Path,
    stubs: tuple[StubVllm, StubServer],
    more: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    for stub, name in zip(stubs, ("sampled", "scored"), strict=True):
        answer = stub.answer

        def recorded(path: str, body: dict[str, Any], name: str = name, answer: Any = answer) -> Any:
            if path == "/v1/completions" and (name == "scored" or "return_token_ids" in body):
                events.append(name)
            return answer(path, body)

        monkeypatch.setattr(stub, "answer", recorded)
    distilled(settings(tmp_path / "run", folder, stubs, **more))
    asked = [ids for body in stubs[1].bodies for ids in body.get("prompt", []) if isinstance(ids, list)]
    last = len(events) - 1 - events[::-1].index("sampled")
    assert "scored" in events[events.index("sampled") : last]

    monkeypatch.setattr(ServedTeacher, "ask_early", lambda self, sample: None)
    stubs[0].restart()
    stubs[1].bodies.clear()
    distilled(settings(tmp_path / "late", folder, stubs, **more))
    late = [ids for body in stubs[1].bodies for ids in body.get("prompt", []) if isinstance(ids, list)]
    assert sorted(asked) == sorted(late)
    check_equal(tmp_path / "run", tmp_path / "late")
