"""The two ways in which OpenAI-compatible completions servers say how likely given tokens are.

Token ids go out, never text. `prompt_logprobs` (vLLM) answers with a dictionary per token, by id; `echo` with `logprobs`
(OpenAI's own, and others') with the prompt's tokens before the generated one. Either way one token is generated in vain:
servers disagree about what 0 means.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from fastkl.trainer.data.samples import UNKNOWN
from fastkl.trainer.servers.answers import (
    TOKEN_ID,
    BadAnswer,
    Unscored,
    answering,
    as_list,
    as_logprob,
    as_logprobs,
    as_object,
    as_text,
    by_id,
    choices,
    id_of,
)
from fastkl.trainer.servers.connection import Connection, Refused
from fastkl.trainer.servers.quoting import quote_value

Api = Literal["prompt_logprobs", "echo"]
APIS: tuple[Api, ...] = ("prompt_logprobs", "echo")


class Scores(NamedTuple):
    """What a server says of the tokens of a sequence, entry by entry; the first token has nothing before it."""

    logprobs: list[float]  # 0 for the first
    best: list[float | None]  # the log-prob of the likeliest token in its position, where the server tells
    texts: list[str | None]  # the token as text, where the server tells
    top: list[dict[int, float]]  # the likeliest tokens in its position, where they were asked for; {} for the first
    ranks: list[int | None]  # 1 for the likeliest token in its position, where the server tells

    def start(self, count: int) -> Scores:
        """Those of the first tokens."""
        return Scores(
            self.logprobs[:count], self.best[:count], self.texts[:count], self.top[:count], self.ranks[:count]
        )


class CompletionsServer:
    """Log-probs of token ids from a server."""

    def __init__(self, model: str, connection: Connection) -> None:
        self._model, self._connection = model, connection
        self.url = connection.url

    @property
    def failures(self) -> int:
        return self._connection.failures

    def score(self, sequences: list[list[int]], api: Api, temperature: float, top_k: int | None = None) -> list[Scores]:
        """The scores of some sequences, in one request; with the `top_k` likeliest tokens of each place if asked for."""
        body = {"model": self._model, "prompt": sequences, "max_tokens": 1, "temperature": temperature, "top_p": 1.0}
        entries = sum(map(len, sequences)) * (2 + (top_k or 1))
        read = _read_prompt_logprobs if api == "prompt_logprobs" else _read_echo
        with answering(self._connection.whose, self.url):
            answer = self._connection.post(f"{self.url}/completions", body | _options(api, top_k), entries)
            found = choices(answer, len(sequences))
            return [read(choice, ids, top_k or 0) for choice, ids in zip(found, sequences, strict=True)]

    def description(self) -> list[object]:
        """What the server calls the model, and what it says that this is made of (vLLM: the folder of the model)."""
        own = self._listed()
        return [self._model, own.get("root"), own.get("parent")]

    def context(self) -> int | None:
        """The most tokens of a sequence, with the one that is generated, where the server tells (vLLM does)."""
        length = self._listed().get("max_model_len")
        return length if type(length) is int else None

    def _listed(self) -> dict[str, Any]:
        """The model's entry in the server's list."""
        listed = (self._connection.told(f"{self.url}/models") or {}).get("data")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        return next((entry for entry in entries if entry.get("id") == self._model), {})

    def tokenize(self, text: str) -> list[int] | None:
        """The ids that the server's own tokenizer gives a text, where it offers that (vLLM does)."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        try:
            with answering(self._connection.whose, self.url):
                tokens = self._connection.post(f"{self.url.removesuffix('/v1')}/tokenize", body).get("tokens")
        except Refused:
            return None
        return (
            tokens
            if isinstance(tokens, list) and all(type(token) is int and 0 <= token < 2**31 for token in tokens)
            else None
        )


def _options(api: Api, top_k: int | None) -> dict[str, Any]:
    if api == "prompt_logprobs":
        return {"prompt_logprobs": top_k or 1}
    ids = {} if top_k is None else {"return_tokens_as_token_ids": True}  # a text does not tell which token it is
    return {"echo": True, "logprobs": top_k or 1, **ids}


def _read_prompt_logprobs(choice: dict[str, Any], ids: list[int], top_k: int) -> Scores:
    entries = choice.get("prompt_logprobs")
    if entries is None:
        raise Unscored("the option prompt_logprobs is ignored: no log-probs of the prompt in the answer")
    _check_length(len(as_list(entries, "prompt_logprobs")), ids)
    _check_first(entries[0])
    scores = Scores([0.0], [None], [None], [{}], [None])
    for position, (token, entry) in enumerate(zip(ids[1:], entries[1:], strict=True), start=1):
        if not isinstance(entry, dict) or str(token) not in entry:
            named = quote_value(list(entry) if isinstance(entry, dict) else entry)
            raise BadAnswer(f"token {position} of the sequence is id {token}, but the log-probs there are of {named}")
        about = {id_of(key): as_object(value, "an entry of prompt_logprobs") for key, value in entry.items()}
        listed = {key: as_logprob(value.get("logprob"), position) for key, value in about.items()}
        actual = about[token]
        scores.logprobs.append(_finite(listed[token]))
        scores.best.append(_greatest(listed) if len(listed) > 1 or actual.get("rank") == 1 else None)
        scores.texts.append(as_text(actual.get("decoded_token"), "decoded_token"))
        scores.top.append(_likeliest(listed, top_k) if top_k else {})
        scores.ranks.append(_rank(actual.get("rank")))
    return scores


def _read_echo(choice: dict[str, Any], ids: list[int], top_k: int) -> Scores:
    answer = as_object({} if choice.get("logprobs") is None else choice["logprobs"], "logprobs")
    values = [] if answer.get("token_logprobs") is None else as_list(answer["token_logprobs"], "token_logprobs")
    if len(values) <= 1 < len(ids):
        raise Unscored("the options echo and logprobs are ignored: no log-probs of the prompt in the answer")
    if len(values) == len(ids) + 1:
        values = values[:-1]  # the generated token
    _check_length(len(values), ids)
    _check_first(values[0])
    logprobs = [0.0, *(_finite(as_logprob(value, position)) for position, value in enumerate(values[1:], start=1))]
    texts = [as_text(text, "a token") for text in _beside(ids, answer, "tokens")]
    for position, (token, text) in enumerate(zip(ids, texts, strict=True)):
        if text is not None and text.startswith(TOKEN_ID) and id_of(text, TOKEN_ID) != token:
            raise BadAnswer(f"token {position} of the sequence is id {token}, but the log-prob there is of {text}")
    tops = [
        {} if top is None else as_logprobs(top, position)
        for position, top in enumerate(_beside(ids, answer, "top_logprobs"))
    ]
    likeliest: list[dict[int, float]] = [{} for _ in ids]
    if top_k:
        likeliest[1:] = [_likeliest(_by_id(top), top_k) for top in tops[1:]]
    return Scores(logprobs, [_greatest(top) for top in tops], texts, likeliest, [None] * len(ids))


def _beside(ids: list[int], answer: dict[str, Any], name: str) -> list[Any]:
    """What an answer says beside each log-prob, without the generated token; nothing where it says nothing."""
    value = answer.get(name)
    return [None] * len(ids) if value in (None, []) else as_list(value, name, (len(ids), len(ids) + 1))[: len(ids)]


def _by_id(top: dict[str, float]) -> dict[int, float]:
    if not all(key.startswith(TOKEN_ID) for key in top):
        raise BadAnswer(
            "echo names the likeliest tokens by their texts, not their ids (the option return_tokens_as_token_ids is "
            "ignored), and a text does not tell which token it is"
        )
    return by_id(top)


def _likeliest(listed: dict[int, float], top_k: int) -> dict[int, float]:
    """The greatest `top_k` log-probs: a server adds the token itself to its list. What is impossible is left out."""
    likeliest = sorted(listed, key=lambda token: -listed[token])[:top_k]
    if len(likeliest) < top_k:
        raise BadAnswer(f"{len(likeliest)} likeliest tokens where {top_k} were asked for: the server has a lower limit")
    return {token: listed[token] for token in likeliest if listed[token] > -math.inf}


def _greatest(listed: dict[Any, float]) -> float | None:
    """None where none is possible: that tells nothing."""
    greatest = max(listed.values(), default=-math.inf)
    return greatest if greatest > -math.inf else None


def _finite(logprob: float) -> float:
    return logprob if logprob > -math.inf else UNKNOWN


def _check_length(count: int, ids: list[int]) -> None:
    if count != len(ids):
        raise BadAnswer(f"{count} log-probs for {len(ids)} tokens: the server did not score the ids that it was sent")


def _check_first(value: object) -> None:
    if value is not None:
        raise BadAnswer(
            f"the first token has the log-prob {quote_value(value)} where there is nothing before it: the log-probs are "
            f"shifted"
        )


def _rank(value: object) -> int | None:
    """None for what is no rank: nothing is learned from it, so it ends no run."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None
