"""A value of one answer is anything at all: the server is refused, or the step ends, by a sentence; or nothing happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from json_cases import JSON, places, replaced
from property_settings import PROPERTY
from stub_vllm import StubVllm
from tiny_models import save_model, tokenizer

from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.config.teacher import TeacherConfig, TeacherServerConfig
from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.servers.check_sampling import check_sampling
from fastkl.trainer.servers.connection import Connection, Refused
from fastkl.trainer.servers.generation import GenerationServer
from fastkl.trainer.teachers import served
from fastkl.trainer.teachers.served import connect

WORDS = tokenizer()


class Direct(Connection):
    """Asks a stub without HTTP, and changes one of its answers."""

    stub: StubVllm
    change: Callable[[Any], Any]
    changed, answered = -1, 0  # which answer; how many there were

    def __init__(self, config: ServerConfig, whose: str) -> None:
        super().__init__(config, whose)
        self.answered = 0

    def post(self, url: str, body: dict[str, Any], entries: int = 0) -> dict[str, Any]:
        path = url.removeprefix("http://127.0.0.1:9")
        status, answer = self.stub.answer(path, json.loads(json.dumps(body)))
        if status != 200:
            raise Refused(str(answer), status)
        self.answered += 1
        answer = json.loads(json.dumps(answer))
        return type(self).change(answer) if self.answered - 1 == self.changed else answer  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def stub(tmp_path_factory: pytest.TempPathFactory) -> StubVllm:
    Direct.stub = StubVllm(save_model(tmp_path_factory.mktemp("models") / "teacher", seed=1))
    Direct.stub.scales = Direct.stub.scores_lists = True
    return Direct.stub


def teach(api: str, temperature: float, top_k: int | None, listed: int | None = None) -> None:
    options: dict[str, Any] = {"api": api, "concurrency": 1, "recheck_every": 1}
    config = TeacherConfig(server=TeacherServerConfig(url="http://127.0.0.1:9/v1", model="stub", **options))
    asked: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "listed": listed}
    teacher = connect(config, WORDS, longest=[3] * 60, remedy="Do this", **asked)
    given = [make_sample([7, 8], [9, 10, 11], index) for index in range(2)]
    for one in given:
        one.student_top_k = None if listed is None else torch.arange(3 * listed).reshape(3, listed)
    teacher.score(given)
    for sample in given:
        assert (sample.teacher_logprobs <= 0).all()
        assert torch.tensor(sample.teacher_logprobs).isfinite().all()


lists = partial(teach, listed=2)


def sample(api: str, temperature: float, top_k: int | None) -> None:
    server = GenerationServer(Direct(ServerConfig(url="http://127.0.0.1:9/v1", model="stub"), "the server"), len(WORDS))
    check_sampling(
        server, "stub", [7, 8, 9], temperature=temperature, highest=len(WORDS) - 1, longest=[3] * 60, remedy="Do this"
    )


APIS = ("prompt_logprobs", "echo")
ORDINARY = [
    (teach, "prompt_logprobs", 1.0, 3),
    (teach, "echo", 1.0, None),
    (lists, "prompt_logprobs", 1.0, None),
    (sample, "sampling", 1.0, None),
]
WAYS = [
    pytest.param(
        *way,
        id=", ".join(map(str, [*(["lists"] if way[0] is lists else []), *way[1:]])),
        marks=() if way in ORDINARY else pytest.mark.slow,
    )
    for way in [
        *((teach, api, *options) for api in APIS for options in ((1.0, None), (0.7, None), (1.0, 3))),
        (lists, "prompt_logprobs", 1.0, None),
        (lists, "prompt_logprobs", 0.7, 3),
        (sample, "sampling", 1.0, None),
        (sample, "sampling", 0.7, None),
    ]
]


@pytest.mark.parametrize(("asked", "api", "temperature", "top_k"), WAYS)
def test_any_value_in_any_answer(
    asked: Callable[..., None], api: str, temperature: float, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = partial(asked, api, temperature, top_k)
    monkeypatch.setattr(served, "Connection", Direct)
    monkeypatch.setattr(Direct, "changed", -1)
    ask()  # it is sound

    @settings(PROPERTY, max_examples=20)
    @given(number=st.integers(0, 11 if asked is lists else 7), place=st.floats(0, 1, exclude_max=True), value=JSON)
    def holds(number: int, place: float, value: Any) -> None:
        def change(answer: Any) -> Any:
            ways = [path for path in places(answer) if path]
            return replaced(answer, ways[int(place * len(ways))], value)

        Direct.changed, Direct.change = number, change  # type: ignore[method-assign, assignment]
        try:
            ask()
        except (ConfigError, ServerError) as error:
            said = str(error)
        else:
            said = ""
        assert said.isprintable()
        assert len(said) < 1200

    holds()
