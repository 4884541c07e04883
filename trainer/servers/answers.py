"""What may stand in an answer: every value that a server sends becomes one of these, or a BadAnswer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from fastkl.trainer.errors import ServerError
from fastkl.trainer.servers.quoting import quote, quote_value

TOKEN_ID = "token_id:"  # how vLLM names tokens where it is asked for return_tokens_as_token_ids
LOWEST = -9999.0  # what servers write for -inf, which JSON lacks
ROUNDING = 1e-3  # how far above 0 arithmetic in 16 bits may take a log-prob


class BadAnswer(ServerError):
    """The answer is not one to what was asked."""


class Unscored(BadAnswer):
    """The answer has no log-probs of the prompt: the server ignored the option."""


@contextmanager
def answering(whose: str, url: str) -> Iterator[None]:
    """Has a BadAnswer name the server. An option that was ignored is for the caller: another may not be."""
    try:
        yield
    except Unscored:
        raise
    except BadAnswer as error:
        raise BadAnswer(f"{whose} at {url} gave an answer that cannot be used: {error}") from error


def as_object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadAnswer(f"{name} is {quote_value(value)}; it must be an object")
    return value


def as_list(value: object, name: str, lengths: Collection[int] = ()) -> list[Any]:
    """A list; of one of the lengths, if any are given."""
    if not isinstance(value, list):
        raise BadAnswer(f"{name} is {quote_value(value)}; it must be a list")
    if lengths and len(value) not in lengths:
        raise BadAnswer(f"{name} has {len(value)} entries; it must have {' or '.join(map(str, lengths))}")
    return value


def as_text(value: object, name: str) -> str | None:
    """A text, or nothing."""
    if value is not None and not isinstance(value, str):
        raise BadAnswer(f"{name} is {quote_value(value)}; it must be a text")
    return value


def as_id(value: object, name: str, below: float = math.inf) -> int:
    """A token id below a limit."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        limit = "" if below == math.inf else f" below {below}"
        raise BadAnswer(f"{name} has the token id {quote_value(value)}; it must be a whole number from 0{limit}")
    return value


def as_ids(value: object, name: str, below: float = math.inf) -> list[int]:
    return [as_id(token, name, below) for token in as_list(value, name)]


def as_logprob(value: object, position: int) -> float:
    """A log-prob, at most 0; −inf for what cannot be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= ROUNDING:
        raise BadAnswer(
            f"token {position} of the sequence has {quote_value(value)} for a log-prob; it must be a number, at most 0"
        )
    return min(float(value), 0.0) if value > LOWEST else -math.inf


def as_logprobs(value: object, position: int) -> dict[str, float]:
    """The log-probs of some tokens in one place, by their names."""
    return {
        name: as_logprob(logprob, position) for name, logprob in as_object(value, "an entry of top_logprobs").items()
    }


def by_id(named: dict[str, float]) -> dict[int, float]:
    """The same by the ids that stand in the names, as `token_id:17`."""
    return {id_of(name, TOKEN_ID): logprob for name, logprob in named.items()}


def id_of(name: str, prefix: str = "") -> int:
    """The id in the name of a token."""
    digits = name.removeprefix(prefix)
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and name == f"{prefix}{int(digits)}"):
        raise BadAnswer(f"a token is named {quote_value(name)}; it must be {prefix or 'its '}id")
    return int(digits)


def choices(answer: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """One choice for each sequence of a request, in the order of the sequences."""
    found = answer.get("choices")
    error = next((answer[name] for name in ("error", "message", "detail") if answer.get(name)), None)
    if not found and error is not None:
        raise BadAnswer(f"the server answered {count} sequences with an error: {_said(error)}")
    if not isinstance(found, list) or len(found) != count:
        given = f"{len(found)} choices" if isinstance(found, list) else f"choices: {quote_value(found)}"
        raise BadAnswer(f"the server answered {count} sequences with {given}")
    indexes: list[Any] = [as_object(choice, "a choice").get("index") for choice in found]
    if any(type(index) is not int for index in indexes) or sorted(indexes) != list(range(count)):
        raise BadAnswer(
            f"the choices have the indexes {quote_value(indexes)}; they must be 0 to {count - 1}, each once, to say "
            f"which sequence is answered"
        )
    return sorted(found, key=lambda choice: choice["index"])


def _said(error: object) -> str:
    """The text of an error, which servers put into an object or not."""
    text = error.get("message") if isinstance(error, dict) else error
    return quote(text) if isinstance(text, str) else quote_value(error)
