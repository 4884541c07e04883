"""Teachers behind HTTP: the log-probs of the model, however they are asked for, and servers that are not fit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_server import StubServer, Trouble, serving
from tiny_models import CHARACTERS, llama, save_model, tokenizer
from transformers import PreTrainedTokenizerFast

from fastkl.head import fuse
from fastkl.trainer.config.teacher import TeacherConfig, TeacherServerConfig
from fastkl.trainer.data.samples import UNKNOWN, Sample, make_sample
from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.servers import connection
from fastkl.trainer.servers.concurrency import gather
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import ServedTeacher, connect

WORDS = tokenizer()
APIS = ("prompt_logprobs", "echo")


@pytest.fixture
def stub(untied: Path) -> Iterator[StubServer]:
    with serving(untied) as server:
        yield server


def connected(
    stub: StubServer,
    temperature: float = 1.0,
    trusted: bool = False,
    top_k: int | None = None,
    words: PreTrainedTokenizerFast = WORDS,
    **options: Any,
) -> ServedTeacher:
    settings = {"model": "stub", "retries": 2, "timeout": 5.0, **options}
    config = TeacherConfig(server=TeacherServerConfig(url=stub.url, **settings), tokenizer="t" if trusted else None)
    return connect(config, words, temperature=temperature, longest=[3] * 60, remedy="Do this", top_k=top_k)


def samples(count: int = 11, highest: int = len(WORDS)) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(highest, (5 + 3 * (i % 5),), generator=generator).tolist() for i in range(count)]
    return [make_sample(row[:3], row[3:], index) for index, row in enumerate(rows)]


def scores(teacher: Any, given: list[Sample]) -> list[list[float]]:
    teacher.score(given)
    return [sample.teacher_logprobs.tolist() for sample in given]


def local(stub: StubServer, temperature: float = 1.0) -> LocalTeacher:
    return LocalTeacher(fuse(stub.model), "padded", 16384, temperature, torch.device("cpu"))


def check_equal(found: list[list[float]], wanted: list[list[float]]) -> None:
    for row, right in zip(found, wanted, strict=True):
        assert row == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("size", [1, 4, 64])
def test_scores_are_those_of_the_model(stub: StubServer, api: str, size: int) -> None:
    teacher = connected(stub, api=api, sequences_per_request=size, concurrency=3)
    check_equal(scores(teacher, samples()), scores(local(stub), samples()))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("k", [1, 4])
def test_the_likeliest_tokens_are_those_of_the_model(stub: StubServer, api: str, k: int) -> None:
    here = LocalTeacher(fuse(stub.model), "padded", 16384, 1.0, torch.device("cpu"), top_k=k)
    ours, theirs = samples(), samples()
    check_equal(scores(connected(stub, api=api, top_k=k), ours), scores(here, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.teacher_top_k is not None
        assert b.teacher_top_k is not None
        assert torch.equal(a.teacher_top_k.ids, b.teacher_top_k.ids)
        torch.testing.assert_close(a.teacher_top_k.logprobs, b.teacher_top_k.logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("api", APIS)
def test_ranks_are_those_of_the_model(stub: StubServer, api: str) -> None:
    given, wanted = samples(), samples()
    teacher = connected(stub, api=api)
    teacher.score(given)
    sent = len(stub.bodies)
    teacher.rank(given, len(WORDS))
    assert len(stub.bodies) == sent  # nothing is asked twice
    local(stub).rank(wanted, len(WORDS))
    told = [sample.teacher_ranks.tolist() for sample in wanted] if api == "prompt_logprobs" else [[]] * len(wanted)
    assert [sample.teacher_ranks.tolist() for sample in given] == told


@pytest.mark.parametrize("value", [None, "3", True, 0, -1, 1.5])
def test_what_is_no_rank_is_left_away(stub: StubServer, value: object) -> None:
    teacher = connected(stub, api="prompt_logprobs")
    stub.told_rank = lambda rank: value
    given = samples()
    check_equal(scores(teacher, given), scores(local(stub), samples()))
    assert not any(len(sample.teacher_ranks) for sample in given)


@pytest.mark.parametrize("api", APIS)
def test_a_server_that_lists_fewer_tokens_is_refused(stub: StubServer, api: str) -> None:
    message = r"gives no log-probs and 21 likeliest tokens \(loss\.top_k\).*more than 20 .*--max-logprobs"
    with pytest.raises(ConfigError, match=message):
        connected(stub, api=api, top_k=21)
    stub.caps = 3  # without a word
    message = r"[34] likeliest tokens where 7 were asked for: the server has a lower limit"
    with pytest.raises(ConfigError, match=message):
        connected(stub, api=api, top_k=7)


def test_likeliest_tokens_that_only_have_texts_are_refused(stub: StubServer) -> None:
    stub.names_ids = False
    with pytest.raises(ConfigError, match=r"by their texts, not their ids .*return_tokens_as_token_ids"):
        connected(stub, api="echo", top_k=3)
    connected(stub, api="echo")


def test_lists_without_what_the_student_does_not_know(stub: StubServer) -> None:
    """Ids of the teacher's padding are left out; a list is padded to its length."""
    teacher = connected(stub, top_k=3)
    found = teacher._likeliest([{1: -0.5, len(WORDS): -1.0, 2: -3.0}, {0: -1.0, 3: -2.0, 4: -3.0}])
    assert found.ids.tolist() == [[1, 2, -1], [0, 3, 4]]
    assert found.logprobs[0, :2].tolist() == [-0.5, -3.0]
    with pytest.raises(ServerError, match="lists no token that the student knows"):
        teacher._likeliest([{len(WORDS): -1.0}])


def test_token_ids_are_sent_and_never_text(stub: StubServer) -> None:
    teacher = connected(stub)
    stub.bodies.clear()
    given = samples(3)
    teacher.score(given)
    assert [body["prompt"] for body in stub.bodies] == [[sample.ids.tolist() for sample in given]]


@pytest.mark.parametrize("only", APIS)
def test_auto_takes_what_the_server_answers(stub: StubServer, only: str) -> None:
    stub.apis = {only}
    check_equal(scores(connected(stub), samples()), scores(local(stub), samples()))
    (other,) = set(APIS) - {only}
    with pytest.raises(ConfigError, match=rf"gives no log-probs of given tokens \({other}: .*ignored.*vLLM"):
        connected(stub, api=other)


def test_choices_may_come_in_any_order(stub: StubServer) -> None:
    stub.defect = "reversed"
    check_equal(scores(connected(stub), samples()), scores(local(stub), samples()))


def test_ids_beyond_the_tokenizer_are_unknown(stub: StubServer) -> None:
    """A padded student samples them; a server would refuse them. What comes after is scored as after PAD_ID."""
    (sample,) = samples(1)
    sample.ids[4] = len(WORDS) + 3
    (found,) = scores(connected(stub), [sample])
    assert found[4] == UNKNOWN
    assert [place for place, rank in enumerate(sample.teacher_ranks) if not rank] == [0, 1, 2, 4]
    assert sample.ids[4] == len(WORDS) + 3
    replaced = make_sample(sample.ids[:3], [*sample.ids[3:4], 0, *sample.ids[5:]], 0)
    (wanted,) = scores(local(stub), [replaced])
    assert found[:4] + found[5:] == pytest.approx(wanted[:4] + wanted[5:], abs=1e-4)


DEFECTS = {
    (
        "ignored",
        "auto",
    ): "gives no log-probs of given tokens .*prompt_logprobs is ignored.*echo and logprobs are ignored",
    **{("shifted", api): "another token likeliest.*shifted by one, to what comes after each token" for api in APIS},
    **{("late", api): "the same log-prob whichever it is.*shifted" for api in APIS},
    ("early", "echo"): "the first token has the log-prob -.*shifted",
    ("bos", "echo"): "the same log-prob whichever it is.*shifted",
    **{("no-top", api): "does not say which token it finds likeliest" for api in APIS},
    ("positive", "prompt_logprobs"): r"token 1 of the sequence has 0\.5 for a log-prob; .* at most 0",
    ("nan", "prompt_logprobs"): "token 1 of the sequence has nan for a log-prob",
    ("one-choice", "echo"): "answered 4 sequences with 1 choices",
}


@pytest.mark.parametrize(("case", "message"), DEFECTS.items(), ids=["-".join(case) for case in DEFECTS])
def test_defects_are_found_at_the_start(stub: StubServer, case: tuple[str, str], message: str) -> None:
    stub.defect, api = case
    with pytest.raises(ConfigError, match=message) as error:
        connected(stub, api=api)
    assert stub.url in str(error.value)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("defect", ["shifted", "late", None])
def test_shifts_are_found_whatever_the_model(tmp_path: Path, seed: int, defect: str | None) -> None:
    with serving(save_model(tmp_path / "m", seed=seed, layers=2, width=24)) as stub:
        stub.defect = defect
        with pytest.raises(ConfigError, match="shifted") if defect else contextlib.nullcontext():
            connected(stub)


OTHERS = {"permuted": CHARACTERS[::-1], "fewer": CHARACTERS.replace("e", "")}


@pytest.mark.parametrize("characters", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("api", APIS)
def test_another_tokenizer_is_found_by_asking(untied: Path, api: str, characters: str) -> None:
    with serving(untied, tokenizer(characters)) as stub:
        message = r"tokenizes differently \(the same text gives \d+ tokens here and \d+ there.*student's family"
        for trusted in (False, True):
            with pytest.raises(ConfigError, match=message):
                connected(stub, api=api, trusted=trusted)


@pytest.mark.parametrize("characters", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("api", APIS)
def test_another_tokenizer_is_found_by_the_texts_of_its_tokens(untied: Path, api: str, characters: str) -> None:
    with serving(untied, tokenizer(characters)) as stub:
        stub.tokenizes = False
        with pytest.raises(ConfigError, match=r"id \d+ is '\S' in the student's tokenizer and .*teacher\.tokenizer"):
            connected(stub, api=api)
        connected(stub, api=api, trusted=True)  # the user answers for it
        stub.words = tokenizer()
        connected(stub, api=api)


def thinking(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one added token."""
    words = tokenizer()
    words.add_tokens(["<think>", text])
    return words


@pytest.mark.parametrize("trusted", [False, True])
def test_an_added_token_of_another_text_is_found_by_asking(tmp_path: Path, trusted: bool) -> None:
    words = thinking("</think>")
    with serving(save_model(tmp_path / "m", words), thinking("</thought>")) as stub:
        ours, missing = [len(words) - 1], r"\[\d+(, \d+)+\] there"
        with pytest.raises(
            ConfigError, match=rf"tokenizes differently: '</think>' is \{ours} here and {missing}: it could"
        ):
            connected(stub, words=words, trusted=trusted)
        stub.words = tokenizer()
        with pytest.raises(ConfigError, match=rf"'<think>' is .* here and {missing}; '</think>' is .* {missing}"):
            connected(stub, words=words, trusted=trusted)
        stub.words = thinking("</think>")
        stub.words.add_tokens(["<more>"])  # the teacher's own
        connected(stub, words=words, trusted=trusted)


@pytest.mark.parametrize("api", APIS)
def test_an_added_token_of_another_text_is_found_by_its_score(tmp_path: Path, api: str) -> None:
    words = thinking("</think>")
    with serving(save_model(tmp_path / "m", words), thinking("</thought>")) as stub:
        stub.tokenizes = False
        named = rf"id {len(words) - 1} is '</think>' in the student's tokenizer and '</thought>'"
        with pytest.raises(ConfigError, match=named):
            connected(stub, words=words, api=api)
        connected(stub, words=words, api=api, trusted=True)
        stub.words = words
        connected(stub, words=words, api=api)


def test_a_server_that_tells_nothing_of_its_tokenizer_needs_one_named(stub: StubServer) -> None:
    stub.tokenizes = stub.tells_texts = False
    with pytest.raises(ConfigError, match=r"tells nothing about its tokenizer; give teacher\.tokenizer"):
        connected(stub)
    connected(stub, trusted=True)


def test_a_smaller_vocabulary_is_found(stub: StubServer) -> None:
    stub.model = llama(len(WORDS) - 1)
    with pytest.raises(ConfigError, match=rf"cannot score id {len(WORDS) - 1}, .* out of vocabulary"):
        connected(stub)


def test_a_context_that_is_too_short_is_found(stub: StubServer) -> None:
    stub.context = 60  # of which a server wants one for the token that it generates
    message = r"cannot score 60 tokens.*HTTP 400.*length is 60.*Do this, or serve the teacher with"
    with pytest.raises(ConfigError, match=message):
        connected(stub)
    stub.context = 61
    connected(stub)


def test_temperature(stub: StubServer) -> None:
    with pytest.raises(ConfigError, match=r"temperature is 0\.7.*temperature 1 whatever a request asks.*Set it to 1"):
        connected(stub, temperature=0.7)
    stub.scales = True
    check_equal(scores(connected(stub, temperature=0.7), samples()), scores(local(stub, 0.7), samples()))


TIMEOUTS: dict[Trouble, float] = {"slow": 0.5}  # a busy machine must not be another trouble


@pytest.mark.parametrize("trouble", [503, 429, 500, 408, "reset", "slow", "no-json", "a-list"])
def test_trouble_that_passes(stub: StubServer, trouble: Trouble, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = connected(stub, timeout=TIMEOUTS.get(trouble, 5.0), concurrency=2, sequences_per_request=3)
    stub.troubles = [trouble, trouble]
    check_equal(scores(teacher, samples()), scores(local(stub), samples()))
    assert "trying again, 3 attempts in all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trouble", "part"),
    [
        (503, "HTTP 503: trouble 503"),
        ("reset", "ConnectionError"),
        ("slow", "ReadTimeout"),
        ("no-json", "no JSON in the answer: <html>"),
        ("a-list", "no JSON object in the answer: [1]"),
    ],
)
def test_trouble_that_stays(stub: StubServer, trouble: Trouble, part: str) -> None:
    teacher = connected(stub, timeout=TIMEOUTS.get(trouble, 5.0), concurrency=1)
    stub.troubles = [trouble] * 3
    with pytest.raises(ServerError, match=r"in 3 attempts.*give the same command again") as error:
        teacher.score(samples(2))
    assert part in str(error.value)
    assert not stub.troubles


def test_a_refusal_is_not_repeated(stub: StubServer) -> None:
    teacher = connected(stub)
    stub.troubles = [400, 418]
    with pytest.raises(ServerError, match="HTTP 400 from"):
        teacher.score(samples(2))
    assert stub.troubles == [418]


def test_answers_are_checked_during_the_run_too(stub: StubServer) -> None:
    teacher = connected(stub)
    for defect in ("ignored", "nan", "one-choice"):
        stub.defect = defect
        with pytest.raises(ServerError):
            teacher.score(samples(2))


def test_retry_after(stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = connected(stub)
    pauses: list[float] = []
    monkeypatch.setattr(connection.time, "sleep", pauses.append)
    stub.headers = {"Retry-After": "7"}
    stub.troubles = [429, 429]
    teacher.score(samples(1))
    assert [pause for pause in pauses if pause] == [7.0, 7.0]  # the stub sleeps for 0


def test_pauses_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(connection.time, "sleep", pauses.append)
    idle = connection.Connection(TeacherServerConfig(url="http://127.0.0.1:9/v1", model="m", retries=7), "the server")
    with pytest.raises(ServerError, match=r"http://127.0.0.1:9/v1/x in 8 attempts .*ConnectionError"):
        idle.post(f"{idle.url}/x", {})
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_once_than_allowed(stub: StubServer, concurrency: int) -> None:
    teacher = connected(stub, concurrency=concurrency, sequences_per_request=1)
    stub.pause, stub.most_at_once = 0.05, 0
    teacher.score(samples())
    assert stub.most_at_once == concurrency


def test_the_first_error_ends_a_gathering() -> None:
    started = []

    def work(item: int) -> int:
        started.append(item)
        if item == 2:
            raise ValueError("two")
        time.sleep(0.01 if item < 2 else 5)
        return item

    start = time.monotonic()
    with pytest.raises(ValueError, match="two"):
        gather(work, range(100), 3)
    assert time.monotonic() - start < 4
    assert len(started) < 10
    assert gather(work, [], 3) == []
    assert gather(lambda item: -item, range(50), 4) == [-item for item in range(50)]


KEY = "sk-very-secret"


def test_the_key_comes_from_the_environment_and_shows_nowhere(
    stub: StubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY + "\n")
    teacher = connected(stub, api_key_env="TEACHER_KEY", concurrency=1)
    assert set(stub.authorizations) == {f"Bearer {KEY}"}
    for trouble, count in ((503, 3), (400, 1)):  # the stub repeats the header in its answers
        stub.troubles = [trouble] * count
        with pytest.raises(ServerError) as error:
            teacher.score(samples(1))
        assert "Bearer ***" in str(error.value)
        assert KEY not in str(error.value) + capsys.readouterr().err


def test_no_key_no_header(stub: StubServer) -> None:
    connected(stub)
    assert set(stub.authorizations) == {None}


@pytest.mark.parametrize("value", [None, " ", "a\nb", "schlüssel"])
def test_a_key_that_is_none(stub: StubServer, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(ConfigError, match=r"server\.api_key_env is 'TEACHER_KEY'.*set it to the API key") as error:
        connected(stub, api_key_env="TEACHER_KEY")
    assert value is None or value.strip() == "" or value not in str(error.value)


@pytest.mark.parametrize(("status", "hint"), [(401, "server.api_key_env"), (403, "server.api_key_env"), (404, "/v1")])
def test_refusals_at_the_start_have_a_hint(stub: StubServer, status: int, hint: str) -> None:
    stub.troubles = [status]
    with pytest.raises(ServerError, match=f"HTTP {status} from .*{hint}"):
        connected(stub)
