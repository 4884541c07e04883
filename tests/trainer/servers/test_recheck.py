"""A teacher's server that changes its mind in the middle of a run is found out, and one that only stammers is not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_server import StubServer, serving
from tiny_models import CHARACTERS, llama, save_model, tokenizer

from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.config.teacher import TeacherConfig, TeacherServerConfig
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.errors import ServerError
from fastkl.trainer.servers.answers import BadAnswer
from fastkl.trainer.servers.completions import Api, CompletionsServer, Scores
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.recheck import Recheck, Reference
from fastkl.trainer.teachers.served import ServedTeacher, connect
from fastkl.trainer.teachers.several import RoutedTeacher

WORDS = tokenizer()
OTHER_WORDS = tokenizer(CHARACTERS[::-1])
APIS: tuple[Api, ...] = ("prompt_logprobs", "echo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "teacher", seed=1)


@pytest.fixture
def stub(folder: Path) -> Iterator[StubServer]:
    with serving(folder) as server:
        yield server


def connected(stub: StubServer, trusted: bool = True, top_k: int | None = None, **options: Any) -> ServedTeacher:
    server = TeacherServerConfig(url=stub.url, model="stub", **{"retries": 2, "concurrency": 1, **options})
    config = TeacherConfig(server=server, tokenizer="t" if trusted else None)
    return connect(config, WORDS, temperature=1.0, longest=[3] * 60, remedy="Do this", top_k=top_k)


def samples(count: int = 4) -> list[Sample]:
    """With one prompt; no tokens that the server might write in a way of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, len(CHARACTERS) + 5, (count, 6), generator=generator).tolist()
    return [make_sample([7, 8, 9], row, index) for index, row in enumerate(rows)]


def forget(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()


def another_model(stub: StubServer) -> None:
    stub.model = llama(len(WORDS), seed=5)


def shift(stub: StubServer) -> None:
    stub.defect = "shifted"


def move(stub: StubServer) -> None:
    stub.defect = "late"


def empty(stub: StubServer) -> None:
    stub.model = copy.deepcopy(stub.model)
    forget(stub.model)


def ignore(stub: StubServer) -> None:
    stub.defect = "ignored"


OTHER = r"is not what it was when the run began: its log-probs of a text are \d\.\d+ off .* the run goes on where it"
CHANGES: dict[str, tuple[Callable[[StubServer], None], str]] = {
    "another model": (another_model, OTHER),
    "shifted": (shift, OTHER),
    "late": (move, OTHER),
    "empty": (empty, OTHER),
    "ignored": (ignore, r"gives no log-probs any more: the option.* ignored"),
}
CHANGED = pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)


@CHANGED
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_server_that_comes_back_as_another_is_found(
    stub: StubServer, api: Api, top_k: int | None, change: Callable[[StubServer], None], message: str
) -> None:
    teacher = connected(stub, api=api, top_k=top_k, recheck_every=0)
    teacher.score(samples())
    stub.troubles = ["reset"]
    teacher.score(samples())  # the same server again
    stub.troubles = [503]
    change(stub)
    with pytest.raises(ServerError, match=message):
        teacher.score(samples())
    if api == "prompt_logprobs":
        with pytest.raises(ServerError):  # nothing has been forgotten
            teacher.score(samples())


@CHANGED
@pytest.mark.parametrize("every", [1, 3])
def test_a_server_that_changes_without_a_word_is_found(
    stub: StubServer, every: int, change: Callable[[StubServer], None], message: str
) -> None:
    teacher = connected(stub, recheck_every=every)
    for _ in range(2 * every - 1):
        teacher.score(samples())
    change(stub)
    with pytest.raises(ServerError, match=message):
        teacher.score(samples())


def test_how_often_it_is_asked(stub: StubServer) -> None:
    for every, wanted in ((0, 0), (1, 6), (2, 3), (5, 1)):
        teacher = connected(stub, recheck_every=every, sequences_per_request=64)
        stub.bodies.clear()
        for _ in range(6):
            teacher.score(samples())
        assert len(stub.bodies) - 6 == wanted


@CHANGED
@pytest.mark.parametrize("every", [0, 5])
def test_the_end_is_compared_too(
    stub: StubServer, every: int, change: Callable[[StubServer], None], message: str
) -> None:
    teacher = connected(stub, recheck_every=every)
    teachers = RoutedTeacher({"a": teacher, "b": teacher})
    teacher.score(samples())
    teachers.recheck()
    asked = len(stub.bodies)
    teachers.recheck()  # nothing has been scored since
    assert len(stub.bodies) == asked
    teacher.score(samples())
    change(stub)
    with pytest.raises(ServerError, match=message):
        teachers.recheck()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_another_tokenizer_is_found(stub: StubServer, api: Api, top_k: int | None) -> None:
    teacher = connected(stub, api=api, top_k=top_k)
    teacher.score(samples())
    stub.words = OTHER_WORDS
    with pytest.raises(
        ServerError, match=r"was sent id \d+, '.', and scored '.?': its log-probs are of another sequence"
    ):
        teacher.score(samples())


def test_a_server_that_writes_tokens_in_another_way_may_do_so(stub: StubServer) -> None:
    stub.tokenizes, stub.words = False, OTHER_WORDS
    teacher = connected(stub, recheck_every=1)  # the user has said that it is the same tokenizer
    teacher.score(samples())
    stub.words = WORDS
    with pytest.raises(ServerError, match=r"has another tokenizer than when the run began: id \d+ was '.' and is '.'"):
        teacher.score(samples())


@pytest.mark.parametrize("api", APIS)
def test_answers_to_other_sequences_are_found(stub: StubServer, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = connected(stub, api=api)
    answer = stub.answer

    def swapped(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return answer(path, {**body, "prompt": body["prompt"][::-1]})

    monkeypatch.setattr(stub, "answer", swapped)
    with pytest.raises(BadAnswer, match=r"its log-probs are of another sequence|but the log-probs there are of"):
        teacher.score(samples())


@pytest.mark.parametrize("value", [-math.log(len(WORDS)), -1.0, -9999.0, 0.0])
def test_a_server_that_has_one_answer_to_everything_is_found(
    stub: StubServer, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first step, though nothing else is wrong: an empty model answers the same, whatever it is asked."""
    teacher = connected(stub, api="echo", recheck_every=0)
    monkeypatch.setattr(stub, "echo", lambda ids, *_: {"token_logprobs": [None, *[value] * len(ids)]})
    with pytest.raises(ServerError, match="is not what it was when the run began"):
        teacher.score(samples())


class Remembered(CompletionsServer):
    """Gives the probe the answers of a list, then what it gave at the start."""

    def __init__(self, offsets: tuple[float, ...] = ()) -> None:
        super().__init__("m", Connection(ServerConfig(url="http://127.0.0.1:9/v1", model="m"), "the teacher's server"))
        self.offsets, self.asked = list(offsets), 0

    def score(self, sequences: list[list[int]], *_: Any) -> list[Scores]:
        self.asked += 1
        return [scores_of(sequences[0], self.offsets.pop(0) if self.offsets else 0.0)]


def scores_of(ids: list[int], offset: float) -> Scores:
    nothing = [None] * len(ids)
    return Scores([0.0, *[-2.0 + offset] * (len(ids) - 1)], nothing, nothing, [{} for _ in ids], nothing)  # type: ignore[arg-type]


def recheck(server: CompletionsServer, noise: float = 0.0, every: int = 0) -> Recheck:
    ids = [1, 2, 3, 4]
    return Recheck(server, Reference("echo", ids, 1.0, None, scores_of(ids, 0.0), noise), every)


@pytest.mark.parametrize(
    ("offsets", "noise", "held"),
    [
        ((0.02,), 0.0, True),
        ((0.1,), 0.0, True),  # once is not always
        ((0.1, -0.1), 0.0, True),
        ((0.1, 0.1, 0.1), 0.0, False),
        ((0.1, 0.1, 0.1), 0.05, True),
    ],
)
def test_noise_is_let_pass(offsets: tuple[float, ...], noise: float, held: bool) -> None:
    check = recheck(Remembered(offsets), noise, every=1)
    if held:
        check.after_step([1, 2], [-1.0, -2.0], 100)
    else:
        with pytest.raises(ServerError, match=r"0\.075 off .* 0\.030 is let pass"):
            check.after_step([1, 2], [-1.0, -2.0], 100)


UNIFORM = -math.log(100)
DIFFERENT = list(range(20))
STEPS: dict[str, tuple[list[int], list[float], int, bool]] = {  # tokens, log-probs, questions, does the run go on
    "ordinary": (DIFFERENT, [-0.1 * token for token in DIFFERENT], 0, True),
    "no token": ([], [], 0, True),
    "one token": ([5], [-3.0], 0, True),
    "two tokens alike": ([5, 6], [-3.0, -3.0], 1, True),
    "known by heart": (DIFFERENT, [-1e-6 * token for token in DIFFERENT], 1, True),
    "one token again and again": ([5] * 20, [-3.0] * 20, 1, True),
    "around −ln V": (DIFFERENT, [UNIFORM + 0.09 * (-1) ** token for token in DIFFERENT], 1, True),
    "constant": (DIFFERENT, [-3.0] * 20, 1, False),
    "constant but for rounding": (DIFFERENT, [-3.0 + 4e-4 * token for token in DIFFERENT], 1, False),
    "−ln V": (DIFFERENT, [UNIFORM] * 20, 1, False),
}


@pytest.mark.parametrize(("tokens", "logprobs", "asked", "held"), STEPS.values(), ids=STEPS)
def test_log_probs_that_are_all_alike(tokens: list[int], logprobs: list[float], asked: int, held: bool) -> None:
    """What may be chance is asked about; what cannot be is the end, whatever the server says of the probe."""
    server = Remembered()
    check = recheck(server)
    if held:
        check.after_step(tokens, logprobs, 100)
    else:
        with pytest.raises(ServerError, match=r"gives all 20 tokens of a step the same log-prob, -\d\.\d\d"):
            check.after_step(tokens, logprobs, 100)
    assert server.asked == asked


@pytest.mark.parametrize("offsets", [(), (0.1,), (0.1, 0.1, 0.1)])
def test_a_run_that_goes_on_compares_with_its_beginning(offsets: tuple[float, ...]) -> None:
    began = recheck(Remembered()).state_dict()
    server = Remembered(offsets)
    later = Recheck(server, Reference("echo", [1, 2, 3, 4], 1.0, None, scores_of([1, 2, 3, 4], 0.1), 0.0), every=1)
    if len(offsets) == 3:
        with pytest.raises(ServerError, match="is not what it was when the run began"):
            later.load_state_dict(began)
    else:
        later.load_state_dict(began)
    assert later.state_dict() == began


def test_a_probe_of_another_kind_is_no_comparison() -> None:
    began = recheck(Remembered()).state_dict() | {"temperature": 0.7}
    server = Remembered()
    later = recheck(server)
    later.load_state_dict(began)
    assert (server.asked, later.state_dict()["temperature"]) == (0, 1.0)
