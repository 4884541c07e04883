"""Whatever JSON a server sends: checked values, or a sentence. Never another exception."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from json_cases import JSON, ODD, places, replaced
from property_settings import PROPERTY

from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.errors import ServerError
from fastkl.trainer.servers.answers import BadAnswer
from fastkl.trainer.servers.completions import Api, CompletionsServer, Scores
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.generation import GenerationServer
from fastkl.trainer.servers.quoting import conceal

VOCABULARY, END, PROMPT = 50, 0, [3, 7, 8]
SEQUENCES = [[3, 7, 8], [9, 4]]


class Scripted(Connection):
    """Gives one answer to everything."""

    def __init__(self, answer: Any) -> None:
        super().__init__(ServerConfig(url="http://127.0.0.1:9/v1", model="m"), "the server")
        self.answer = answer

    def post(self, url: str, body: dict[str, Any], entries: int = 0) -> dict[str, Any]:
        return self.answer  # type: ignore[no-any-return]


def entry(token: int) -> dict[str, Any]:
    own = {"logprob": -1.5, "rank": 2, "decoded_token": f"<{token}>"}
    return {str(token): own, "11": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}


def prompt_logprobs() -> dict[str, Any]:
    rows = [[None, *map(entry, ids[1:])] for ids in SEQUENCES]
    return {"choices": [{"index": index, "prompt_logprobs": row} for index, row in enumerate(rows)]}


def echo() -> dict[str, Any]:
    def choice(index: int, ids: list[int]) -> dict[str, Any]:
        top = {"token_id:11": -0.5, "token_id:12": -1.5}
        tokens = [f"token_id:{token}" for token in [*ids, 5]]
        values = [None, *[-1.5] * len(ids)]
        tops = [None, *[dict(top) for _ in ids]]
        return {"index": index, "logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}}

    return {"choices": [choice(index, ids) for index, ids in enumerate(SEQUENCES)]}


def completion() -> dict[str, Any]:
    logprobs = {"token_logprobs": [-1.0, -0.5], "top_logprobs": [{"token_id:5": -1.0, "token_id:6": -2.0}, None]}
    ids = {"token_ids": [5, 6], "prompt_token_ids": PROMPT}
    return {"choices": [{"index": 0, "logprobs": logprobs, "finish_reason": "length", **ids}]}


def score(answer: Any, api: Api, top_k: int | None = None) -> list[Scores]:
    return CompletionsServer("m", Scripted(answer)).score(SEQUENCES, api, 1.0, top_k)


def complete(answer: Any, most: int = 2) -> Completion:
    server = GenerationServer(Scripted(answer), VOCABULARY)
    options: dict[str, Any] = {"temperature": 1.0, "seed": 1, "cache_salt": "s", "eos_token_ids": [END]}
    return server.complete("m", PROMPT, max_new_tokens=most, **options)


def likeliest(answer: Any) -> dict[int, float]:
    return GenerationServer(Scripted(answer), VOCABULARY).likeliest("m", PROMPT, 1.0)


def told(ask: Callable[[Any], Any], answer: Any, check: Callable[[Any], None]) -> str:
    """What is said of an answer; nothing where it is taken, and then it is checked."""
    try:
        found = ask(answer)
    except ServerError as error:
        return str(error)
    check(found)
    return ""


def is_logprob(value: object) -> bool:
    return type(value) is float and math.isfinite(value) and value <= 0


def check_scores(found: list[Scores]) -> None:
    for scores, ids in zip(found, SEQUENCES, strict=True):
        assert {len(field) for field in scores} == {len(ids)}
        assert all(map(is_logprob, scores.logprobs))
        assert all(value is None or is_logprob(value) for value in scores.best)
        assert all(text is None or type(text) is str for text in scores.texts)
        assert all(type(token) is int and is_logprob(value) for top in scores.top for token, value in top.items())


def check_completion(found: Completion) -> None:
    assert all(type(token) is int and 0 <= token < VOCABULARY for token in found.token_ids)
    assert all(map(is_logprob, found.logprobs))
    assert len(found.logprobs) == len(found.token_ids) <= 2
    assert END not in found.token_ids[:-1]
    assert found.truncated == (found.token_ids[-1] != END)


def check_likeliest(found: dict[int, float]) -> None:
    assert all(type(token) is int and type(value) is float and value <= 0 for token, value in found.items())


def check_ids(found: list[int] | None) -> None:
    assert found is None or all(type(token) is int for token in found)


Asked = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], None]]
ASKED: dict[str, Asked] = {
    "prompt_logprobs": (prompt_logprobs, lambda answer: score(answer, "prompt_logprobs"), check_scores),
    "prompt_logprobs, likeliest": (prompt_logprobs, lambda answer: score(answer, "prompt_logprobs", 2), check_scores),
    "echo": (echo, lambda answer: score(answer, "echo"), check_scores),
    "echo, likeliest": (echo, lambda answer: score(answer, "echo", 2), check_scores),
    "tokenize": (
        lambda: {"tokens": [1, 2]},
        lambda answer: CompletionsServer("m", Scripted(answer)).tokenize("a"),
        check_ids,
    ),
    "completion": (completion, complete, check_completion),
    "likeliest of a sampler": (completion, likeliest, check_likeliest),
}
EVERYTHING = pytest.mark.parametrize(("sound", "ask", "check"), ASKED.values(), ids=ASKED)


@EVERYTHING
def test_sound_answers_are_read(
    sound: Callable[[], Any], ask: Callable[[Any], Any], check: Callable[[Any], None]
) -> None:
    check(ask(sound()))


@EVERYTHING
def test_any_json_in_any_place(
    sound: Callable[[], Any], ask: Callable[[Any], Any], check: Callable[[Any], None]
) -> None:
    ways = [path for path in places(sound()) if path]

    @PROPERTY
    @given(path=st.sampled_from(ways), value=JSON)
    @example(path=ways[0], value=[[[[[[]]]]]])
    def holds(path: tuple[Any, ...], value: Any) -> None:
        said = told(ask, replaced(sound(), path, value), check)
        assert said.isprintable()
        assert len(said) < 600

    holds()


@EVERYTHING
def test_odd_values_in_every_place(
    sound: Callable[[], Any], ask: Callable[[Any], Any], check: Callable[[Any], None]
) -> None:
    for path in places(sound()):
        for value in ODD if path else [{}, {"choices": None}]:
            told(ask, replaced(sound(), path, value), check)


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("indexes", [(0, 0), (1, 1), (1, 2), (-1, 0), (False, True), (0.0, 1.0), ("0", "1"), (0, None)])
def test_indexes_of_choices(api: Api, indexes: tuple[Any, Any]) -> None:
    answer = ASKED[api][0]()
    for choice, index in zip(answer["choices"], indexes, strict=True):
        choice["index"] = index
    with pytest.raises(BadAnswer, match=r"the choices have the indexes .*; they must be 0 to 1, each once"):
        score(answer, api)


def test_choices_of_other_sequences() -> None:
    answer = echo()
    answer["choices"][1]["logprobs"]["tokens"][1] = "token_id:5"
    with pytest.raises(BadAnswer, match="token 1 of the sequence is id 4, but the log-prob there is of token_id:5"):
        score(answer, "echo")


COMPLETIONS: dict[str, tuple[list[Any], list[Any], str]] = {
    "text": (["5", 6], [-1.0, -1.0], "has the token id '5'; it must be a whole number from 0 below 50"),
    "float": ([5.0, 6], [-1.0, -1.0], "has the token id 5.0"),
    "bool": ([True, 6], [-1.0, -1.0], "has the token id True"),
    "negative": ([-1, 6], [-1.0, -1.0], "has the token id -1"),
    "beyond": ([5, 50], [-1.0, -1.0], "has the token id 50"),
    "goes on": ([0, 5], [-1.0, -1.0], "goes on after id 0, an end, at token 0 of 2"),
    "too long": ([5, 6, 0], [-1.0, -1.0, -1.0], "has 3 tokens where 2 were asked for at most"),
    "too short": ([5], [-1.0], "ended after 1 tokens of 2 with id"),
    "empty": ([], [], "ended after 0 tokens of 2"),
    "positive": ([5, 6], [-1.0, 0.1], "token 4 of the sequence has 0.1 for a log-prob"),
    "nan": ([5, 6], [-1.0, math.nan], "has nan for a log-prob"),
    "impossible": ([5, 6], [-1.0, -math.inf], "token 1 has the log-prob −inf, and was sampled"),
    "impossible, as vLLM writes it": ([5, 6], [-1.0, -9999.0], "token 1 has the log-prob −inf"),
    "one short": ([5, 6], [-1.0], "has 1 log-probs for 2 sampled tokens"),
}


@pytest.mark.parametrize(("tokens", "logprobs", "message"), COMPLETIONS.values(), ids=COMPLETIONS)
def test_completions_that_are_none(tokens: list[Any], logprobs: list[Any], message: str) -> None:
    answer = completion()
    answer["choices"][0] |= {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
    with pytest.raises(BadAnswer, match=f"the server at http://127.0.0.1:9/v1 gave an answer .*{message}"):
        complete(answer)


def test_what_rounding_puts_above_zero_is_zero() -> None:
    answer = completion()
    answer["choices"][0]["logprobs"]["token_logprobs"] = [5e-4, -1]
    assert complete(answer).logprobs == [0.0, -1.0]


@pytest.mark.parametrize("value", [["Bearer {}"], {"{}": {"{}": 1}}, "x" * 70 + "{}", "\x1b[2J {}", [[["{}"]]]])
def test_quotes_of_answers_have_no_keys_and_no_control_characters(value: Any) -> None:
    key = "sekret-" + "k" * 40
    conceal(key)
    value = json.loads(json.dumps(value).replace("{}", key))
    for sound, ask, check in ASKED.values():
        for path in places(sound()):
            said = told(ask, replaced(sound(), path, value) if path else {"choices": value}, check)
            assert "sekret" not in said, path
            assert said.isprintable(), path


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "OpenAI's": ({"error": {"message": "Out of\nmemory sk-in-error", "code": 500}}, r"Out of memory \*\*\*$"),
    "a text": ({"error": "busy\x1b[2J", "choices": []}, r"busy\\x1b\[2J$"),
    "an object": ({"error": {"code": 7}, "choices": None}, r"\{'code': 7\}$"),
    "vLLM's": ({"object": "error", "message": "no such model"}, "no such model$"),
    "FastAPI's": ({"detail": [{"msg": "too long"}]}, "too long"),
    "long": ({"error": "a" * 5000}, "a{300}…$"),
}


@pytest.mark.parametrize(("answer", "shown"), ERRORS.values(), ids=ERRORS)
def test_an_error_in_place_of_choices_is_quoted(answer: dict[str, Any], shown: str) -> None:
    conceal("sk-in-error")
    with pytest.raises(BadAnswer, match=f"the server answered 2 sequences with an error: .*{shown}"):
        CompletionsServer("m", Scripted(answer)).score(SEQUENCES, "echo", 1.0)
    with pytest.raises(BadAnswer, match=f"answered 1 sequences with an error: .*{shown}"):
        GenerationServer(Scripted(answer), VOCABULARY).likeliest("m", PROMPT, 1.0)
