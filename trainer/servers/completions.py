"""The two ways in which OpenAI-compatible completions servers say how likely given tokens are.

Token ids go out, never text. `prompt_logprobs` (vLLM) answers with a dictionary per token, by id; `echo` with `logprobs`
(OpenAI's own, and others') with the prompt's tokens before the generated one. Either way one token is generated in vain:
servers disagree about what 0 means.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from fastkl.trainer.data.samples import UNKNOWN
from fastkl.trainer.errors import ServerError
from fastkl.trainer.servers.connection import Connection, Refused

Api = Literal["prompt_logprobs", "echo"]
APIS: tuple[Api, ...] = ("prompt_logprobs", "echo")
TOKEN_ID = "token_id:"  # how vLLM names tokens where it is asked for return_tokens_as_token_ids
LOWEST = -9999.0  # what servers write for -inf, which JSON lacks
ROUNDING = 1e-3  # how far above 0 a log-prob may be


class BadAnswer(ServerError):
    """The answer is not one to what was asked."""


class Unscored(BadAnswer):
    """The answer has no log-probs of the prompt: the server ignored the option."""


class Scores(NamedTuple):
    """What a server says of the tokens of a sequence, entry by entry; the first token has nothing before it."""

    logprobs: list[float]  # 0 for the first
    best: list[float | None]  # the log-prob of the likeliest token in its position, where the server tells
    texts: list[str | None]  # the token as text, where the server tells
    top: list[dict[int, float]]  # the likeliest tokens in its position, where they were asked for; {} for the first
    ranks: list[int | None]  # 1 for the likeliest token in its position, where the server tells


class CompletionsServer:
    """Log-probs of token ids from a server."""

    def __init__(self, model: str, connection: Connection) -> None:
        self._model, self._connection = model, connection
        self.url = connection.url

    def score(self, sequences: list[list[int]], api: Api, temperature: float, top_k: int | None = None) -> list[Scores]:
        """The scores of some sequences, in one request; with the `top_k` likeliest tokens of each place if asked for."""
        body = {"model": self._model, "prompt": sequences, "max_tokens": 1, "temperature": temperature, "top_p": 1.0}
        answer = self._connection.post(f"{self.url}/completions", body | _options(api, top_k))
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != len(sequences):
            count = len(choices) if isinstance(choices, list) else "no"
            raise BadAnswer(f"{self.url} answered {len(sequences)} sequences with {count} choices")
        read = _read_prompt_logprobs if api == "prompt_logprobs" else _read_echo
        try:
            ordered = sorted(choices, key=lambda choice: choice["index"])
            return [read(choice, ids, top_k or 0) for choice, ids in zip(ordered, sequences, strict=True)]
        except (AttributeError, KeyError, TypeError) as error:
            raise BadAnswer(f"the answer of {self.url} is not in the form of {api}: {error!r}") from error

    def tokenize(self, text: str) -> list[int] | None:
        """The ids that the server's own tokenizer gives a text, where it offers that (vLLM does)."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        try:
            tokens = self._connection.post(f"{self.url.removesuffix('/v1')}/tokenize", body).get("tokens")
        except Refused:
            return None
        return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else None


def _options(api: Api, top_k: int | None) -> dict[str, Any]:
    if api == "prompt_logprobs":
        return {"prompt_logprobs": top_k or 1}
    ids = {} if top_k is None else {"return_tokens_as_token_ids": True}  # a text does not tell which token it is
    return {"echo": True, "logprobs": top_k or 1, **ids}


def _read_prompt_logprobs(choice: dict[str, Any], ids: list[int], top_k: int) -> Scores:
    entries = choice.get("prompt_logprobs")
    if entries is None:
        raise Unscored("the option prompt_logprobs is ignored: no log-probs of the prompt in the answer")
    _check_length(len(entries), ids)
    _check_first(entries[0])
    scores = Scores([0.0], [None], [None], [{}], [None])
    for position, (token, entry) in enumerate(zip(ids[1:], entries[1:], strict=True), start=1):
        if not isinstance(entry, dict) or str(token) not in entry:
            named = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
            raise BadAnswer(f"token {position} of the sequence is id {token}, but the log-probs there are of {named}")
        actual, listed = entry[str(token)], {int(key): other.get("logprob") for key, other in entry.items()}
        scores.logprobs.append(read_logprob(actual.get("logprob"), position))
        scores.best.append(max(listed.values()) if len(entry) > 1 or actual.get("rank") == 1 else None)
        scores.texts.append(actual.get("decoded_token"))
        scores.top.append(_likeliest(listed, top_k, position) if top_k else {})
        scores.ranks.append(_rank(actual.get("rank")))
    return scores


def _read_echo(choice: dict[str, Any], ids: list[int], top_k: int) -> Scores:
    answer = choice.get("logprobs")
    values = answer.get("token_logprobs") if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or values is None or len(values) <= 1 < len(ids):
        raise Unscored("the options echo and logprobs are ignored: no log-probs of the prompt in the answer")
    if len(values) == len(ids) + 1:
        values = values[:-1]  # the generated token
    _check_length(len(values), ids)
    _check_first(values[0])
    logprobs = [0.0, *(read_logprob(value, position) for position, value in enumerate(values[1:], start=1))]
    tops = (answer.get("top_logprobs") or [None] * len(ids))[: len(ids)]
    best = [max(top.values()) if top else None for top in tops]
    texts = (answer.get("tokens") or [None] * len(ids))[: len(ids)]
    likeliest: list[dict[int, float]] = [{} for _ in ids]
    if top_k:
        likeliest[1:] = [_likeliest(_by_id(top), top_k, position) for position, top in enumerate(tops[1:], start=1)]
    return Scores(logprobs, best, texts, likeliest, [None] * len(ids))


def _by_id(top: dict[str, float] | None) -> dict[int, float]:
    keys = [key.removeprefix(TOKEN_ID) for key in top or {} if key.startswith(TOKEN_ID)]
    if top is None or len(keys) < len(top):
        raise BadAnswer(
            "echo names the likeliest tokens by their texts, not their ids (the option return_tokens_as_token_ids is "
            "ignored), and a text does not tell which token it is"
        )
    return {int(key): value for key, value in zip(keys, top.values(), strict=True)}


def _likeliest(listed: dict[int, float], top_k: int, position: int) -> dict[int, float]:
    """The greatest `top_k` log-probs: a server adds the token itself to its list. What is impossible is left out."""
    values = {token: read_logprob(value, position) for token, value in listed.items()}
    likeliest = sorted(values, key=lambda token: -values[token])[:top_k]
    if len(likeliest) < top_k:
        raise BadAnswer(f"{len(likeliest)} likeliest tokens where {top_k} were asked for: the server has a lower limit")
    return {token: values[token] for token in likeliest if listed[token] > LOWEST}


def _check_length(count: int, ids: list[int]) -> None:
    if count != len(ids):
        raise BadAnswer(f"{count} log-probs for {len(ids)} tokens: the server did not score the ids that it was sent")


def _check_first(value: object) -> None:
    if value is not None:
        raise BadAnswer(
            f"the first token has the log-prob {value} where there is nothing before it: the log-probs are shifted"
        )


def _rank(value: object) -> int | None:
    """None for what is no rank: nothing is learned from it, so it ends no run."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_logprob(value: object, position: int) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= ROUNDING:
        raise BadAnswer(
            f"token {position} of the sequence has {value!r} for a log-prob; it must be a number, at most 0"
        )
    return float(value) if value > LOWEST else UNKNOWN
