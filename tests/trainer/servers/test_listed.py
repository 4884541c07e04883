"""Servers that score ids that they are sent: those that do, and all the others, which are refused before a run starts."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stub_server import StubServer, serving
from tiny_models import tokenizer

from fastkl.head import fuse
from fastkl.trainer.config.teacher import TeacherConfig, TeacherServerConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.errors import ConfigError, RunError, ServerError
from fastkl.trainer.servers.answers import BadAnswer
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.listed import ListServer
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import ServedTeacher, connect

WORDS = tokenizer()
K = 4


@pytest.fixture
def stub(untied: Path) -> Iterator[StubServer]:
    with serving(untied) as server:
        server.scores_lists = True
        yield server


def connected(stub: StubServer, top_k: int | None = None, k: int = K, temperature: float = 1.0) -> ServedTeacher:
    config = TeacherConfig(server=TeacherServerConfig(url=stub.url, model="stub", retries=1))
    asked: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "listed": k}
    return connect(config, WORDS, longest=[3] * 60, remedy="Do this", **asked)


def samples() -> list[Sample]:
    """Some of several turns, and one without a token that counts."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for index in range(6):
        ids = torch.randint(len(WORDS), (9 + index,), generator=draw).tolist()
        mask = [False] * 3 + [True] * 2 + [False] * (index % 3) + [True] * (4 + index - index % 3)
        mask = [False] * len(ids) if index == 5 else mask
        lists = [torch.randperm(len(WORDS), generator=draw)[:K] for _ in range(sum(mask))]
        listed = torch.stack(lists) if lists else torch.zeros(0, K, dtype=torch.int64)
        made.append(Sample(ids, mask, index, student_top_k=listed))
    return made


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probs_are_those_of_the_model(stub: StubServer, top_k: int | None, temperature: float) -> None:
    stub.scales = True
    here = LocalTeacher(fuse(stub.model), "padded", 16384, temperature, torch.device("cpu"), top_k=top_k)
    ours, theirs = samples(), samples()
    connected(stub, top_k, temperature=temperature).score(ours)
    here.score(theirs)
    for a, b, before in zip(ours, theirs, samples(), strict=True):
        assert a.teacher_logprobs == pytest.approx(b.teacher_logprobs, abs=1e-4)
        assert a.teacher_top_k is not None
        assert b.teacher_top_k is not None
        assert torch.equal(a.teacher_top_k.ids, b.teacher_top_k.ids)
        torch.testing.assert_close(a.teacher_top_k.logprobs, b.teacher_top_k.logprobs, atol=1e-4, rtol=1e-4)
        if top_k is None:
            assert torch.equal(a.teacher_top_k.ids.long(), before.student_top_k)


def test_what_is_asked(stub: StubServer) -> None:
    """As vLLM documents it: rows from the first place with a list on, empty ones where nothing counts."""
    teacher, given = connected(stub), samples()[2]
    asked = given.student_top_k
    assert asked is not None
    stub.bodies.clear()
    teacher.score([given])
    (body,) = [body for body in stub.bodies if "token_ids" in body]
    rows = iter(asked.tolist())
    lists = [next(rows) if counted else [] for counted in given.loss_mask]
    assert body == {
        "model": "stub",
        "token_ids": given.ids.tolist(),
        "stream": False,
        "sampling_params": {
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprob_token_ids": lists[3:],
            "prompt_logprob_start": 2,
        },
    }


def test_what_is_impossible_is_left_out_of_a_list(stub: StubServer) -> None:
    teacher, given = connected(stub), samples()[0]
    assert given.student_top_k is not None
    stub.model.lm_head.bias = torch.nn.Parameter(torch.zeros(stub.model.config.vocab_size))
    never = int(given.student_top_k[0, 1])
    stub.model.lm_head.bias.data[never] = -torch.inf
    listed = given.student_top_k.clone()
    teacher.score([given])
    assert given.teacher_top_k is not None
    assert given.teacher_top_k.ids[0].tolist() == [*(token for token in listed[0].tolist() if token != never), -1]
    stub.model.lm_head.bias.data[listed[0]] = -torch.inf
    given.student_top_k = listed
    with pytest.raises(RunError, match=r"none of the 4 tokens of a list any probability"):
        teacher.score([given])


def old(stub: StubServer) -> None:
    stub.scores_lists = False


def defect(name: str) -> Callable[[StubServer], None]:
    return lambda stub: setattr(stub, "list_defect", name)


def shorter(stub: StubServer) -> None:
    stub.lists = shorten(stub)  # type: ignore[method-assign]


def shorten(stub: StubServer) -> Any:
    ask = stub.lists

    def refusing(ids: list[int], **parameters: Any) -> tuple[int, Any]:
        return (400, {"error": "too long for a matrix"}) if len(ids) > 40 else ask(ids, **parameters)

    return refusing


NEEDED = r"does not score given ids, which loss\.top_k_of: student and both need: .*"
REMEDY = r".*--enable-scale-out --max-logprobs 20.*load it here with a path, or set loss\.top_k_of to teacher"
UNFIT: dict[str, tuple[Callable[[StubServer], None], str]] = {
    "old": (old, NEEDED + "404" + REMEDY),
    "ignored": (defect("ignored"), NEEDED + "prompt_logprob_token_ids is ignored" + REMEDY),
    "shifted": (
        defect("shifted"),
        r"other log-probs than it gives them in its own lists, up to \d+\.\d\d nats" + REMEDY,
    ),
    "sorted": (defect("sorted"), r"in its own lists, up to \d+\.\d\d nats apart" + REMEDY),
    "from-0": (defect("from-0"), r"in its own lists, up to \d+\.\d\d nats apart" + REMEDY),
    "positive": (defect("positive"), NEEDED + r"token 1 of the sequence has 0\.5 for a log-prob" + REMEDY),
    "nan": (defect("nan"), NEEDED + r"token 1 of the sequence has nan for a log-prob" + REMEDY),
    "float64": (defect("float64"), NEEDED + r"prompt_token_id_logprobs is .*<f8.*; it must be .*<f4" + REMEDY),
    "transposed": (defect("transposed"), NEEDED + r"'shape': \(\d+, \d\).*ids that were sent" + REMEDY),
    "shorter": (
        shorter,
        r"cannot score 4 given ids \(loss\.top_k\) in each place of 60 tokens.*too long.*Do this, or lower",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNFIT.values(), ids=UNFIT)
def test_servers_that_are_not_fit(stub: StubServer, change: Callable[[StubServer], None], message: str) -> None:
    change(stub)
    with pytest.raises(ConfigError, match=message):
        connected(stub)


def test_lists_that_go_wrong_in_a_run(stub: StubServer) -> None:
    """As they would if a long prompt were scored in pieces, and one of them got the rows of another."""
    teacher, given = connected(stub), samples()
    for sample in given:
        assert sample.student_top_k is not None
        counted = [token for token, counts in zip(sample.ids.tolist(), sample.loss_mask, strict=True) if counts]
        sample.student_top_k[:, 2] = torch.tensor(counted, dtype=torch.int64)
        others = torch.tensor([[(token + 1 + i) % len(WORDS) for i in range(K)] for token in counted])
        sample.student_top_k = torch.where(torch.arange(K) == 2, sample.student_top_k, others.reshape(-1, K))
    teacher.score([*map(copy.copy, given)])
    stub.list_defect = "shifted"
    with pytest.raises(ServerError, match=r"other log-probs than it gives them in its ordinary answer, \d\.\d\d nats"):
        teacher.score(given)


def test_more_ids_than_the_server_lists(stub: StubServer) -> None:
    connected(stub, k=20)
    message = r"cannot score 21 given ids \(loss\.top_k\) in each place of 60 tokens, .*more than 20.*--max-logprobs"
    with pytest.raises(ConfigError, match=message):
        connected(stub, k=21)


def test_a_server_at_another_temperature_than_its_own_lists(stub: StubServer) -> None:
    """vLLM takes raw logits for the matrix, whatever a server in front of it does to the ordinary answer."""
    ask = stub.lists
    stub.scales = True
    stub.lists = lambda ids, **parameters: ask(ids, **{**parameters, "temperature": 1.0})  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="in its own lists"):
        connected(stub, temperature=0.5)
    connected(stub)


def encoded(matrix: Any, **options: Any) -> str:
    file = io.BytesIO()
    np.save(file, matrix, **options)
    return base64.b64encode(file.getvalue()).decode()


GOOD = np.array([[-1.0, -2.0], [-3.0, -np.inf]], np.float32)
ANSWERS: dict[str, tuple[object, str]] = {
    "text": ("no base64!", "must be an .npy file in base64"),
    "bytes": (base64.b64encode(b"no npy").decode(), "must be an .npy file in base64"),
    "header": (base64.b64encode(b"\x93NUMPY\x01\x00\x08\x00{'descr'").decode(), "must be an .npy file in base64"),
    "unclosed": (base64.b64encode(b"\x93NUMPY\x01\x00\x04\x00({[\n").decode(), "must be an .npy file in base64"),
    "cut": (encoded(GOOD)[:-8], r"with 10 bytes; it must be .*'shape': \(2, 2\)"),
    "objects": (encoded(np.array([[{}, {}], [{}, {}]]), allow_pickle=True), r"'descr': '.O'"),
    "large": (encoded(np.zeros((2, 3), np.float32)), r"'shape': \(2, 3\).* must be .*\(2, 2\)"),
    "columns": (encoded(np.asfortranarray(GOOD)), r"'fortran_order': True"),
    "deep": (base64.b64encode(b"\x93NUMPY\x02\x00\x20\xa1\x07\x00" + b"(" * 500000).decode(), "must be an .npy file"),
    "empty": ("", "must be an .npy file in base64"),
    "list": ([[-1.0, -2.0]], "it must be a text"),
}


@pytest.mark.parametrize(("answer", "message"), ANSWERS.values(), ids=ANSWERS)
def test_what_is_no_matrix(answer: object, message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        ListServer("m", Scripted(answer)).score([1, 2, 3], [[], [5, 6], [7]], 1.0)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_a_matrix_of_any_version(version: tuple[int, int]) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, GOOD, version)
    answer = base64.b64encode(file.getvalue()).decode()
    assert ListServer("m", Scripted(answer)).score([1, 2, 3], [[], [5, 6], [7]], 1.0) == [[], [-1.0, -2.0], [-3.0]]


class Scripted(Connection):
    """Says one thing."""

    def __init__(self, answer: object) -> None:
        self.whose, self.url, self._answer = "the server", "http://127.0.0.1:9/v1", answer

    def post(self, url: str, body: dict[str, Any], entries: int = 0) -> dict[str, Any]:
        assert url == "http://127.0.0.1:9/inference/v1/generate"
        return {"prompt_token_id_logprobs": self._answer}
