"""Whether a teacher's server still is what it was when the run began.

It may have been started again with another model, or have been put to sleep and have woken up without its weights. It then
answers as politely as before. So the first probe is asked again, now and then and whenever there is a reason to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastkl.trainer.errors import ServerError
from fastkl.trainer.servers.answers import Unscored
from fastkl.trainer.servers.completions import Api, CompletionsServer, Scores
from fastkl.trainer.servers.constant import alike, meaningless
from fastkl.trainer.servers.quoting import quote_value

GROWTH, MARGIN = 3.0, 0.03  # so many times the noise at the start, and some nats: what a busy server does in 16 bits
ATTEMPTS = 3  # noise is another one each time, another model is not
NEAR_UNIFORM = 0.1  # nats from −ln V
REMEDY = "Serve the model that the run began with, and give the same command: the run goes on where it stopped"


class Reference(NamedTuple):
    """What a server answered to a probe at the start."""

    api: Api
    ids: list[int]
    temperature: float
    top_k: int | None
    scores: Scores  # of `ids`
    noise: float  # nats: how far apart its answers about the same text were, on average over the text

    def ask(self, server: CompletionsServer) -> Scores:
        return server.score([self.ids], self.api, self.temperature, self.top_k)[0]


class Recheck:
    """Asks the probe again, and ends the run if the answer is another one.

    Args:
        every: After so many steps without a reason; 0: only with one, and at the end.
    """

    def __init__(self, server: CompletionsServer, reference: Reference, every: int) -> None:
        self._server, self._reference, self._every = server, reference, every
        self._failures = self._steps = 0  # failures before the last check, steps since

    def after_step(self, tokens: Sequence[int], logprobs: Sequence[float], vocabulary: int) -> None:
        """Checks the server once it has scored a step's tokens; a ServerError says what has changed."""
        self._steps += 1
        suspicious = _suspicious(logprobs, vocabulary)
        failed = self._server.failures != self._failures
        if suspicious or failed or (self._every and self._steps >= self._every):
            self._compare()
        if meaningless(tokens, logprobs):  # whatever it says of the probe
            raise self._ended(f"gives all {len(tokens)} tokens of a step the same log-prob, {logprobs[0]:.2f}")

    def at_the_end(self) -> None:
        """Checks the server once more if it has scored a step since the last check; a ServerError as in `after_step`."""
        if self._steps:
            self._compare()

    def state_dict(self) -> dict[str, Any]:
        return {**self._reference._asdict(), "scores": self._reference.scores._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what the server answered when the run began, unless it was asked in another way.

        Raises:
            ServerError: If it answers otherwise now.
        """
        began = Reference(**{**state, "scores": Scores(**state["scores"])})
        same = ("api", "ids", "temperature", "top_k")
        if all(getattr(began, name) == getattr(self._reference, name) for name in same):
            self._reference = began
            self._compare()

    def _compare(self) -> None:
        limit, failures = GROWTH * self._reference.noise + MARGIN, self._server.failures
        for _ in range(ATTEMPTS):
            again = self._ask()
            self._compare_texts(again)
            error = distance(again.logprobs, self._reference.scores.logprobs)
            if error <= limit:
                self._failures, self._steps = failures, 0
                return
        raise self._ended(
            f"is not what it was when the run began: its log-probs of a text are {error:.3f} off (nats, on average; "
            f"{limit:.3f} is let pass)"
        )

    def _ask(self) -> Scores:
        try:
            return self._reference.ask(self._server)
        except Unscored as error:
            raise self._ended(f"gives no log-probs any more: {error}") from error

    def _compare_texts(self, again: Scores) -> None:
        for token, before, now in zip(self._reference.ids, self._reference.scores.texts, again.texts, strict=True):
            if before is not None and now is not None and before != now:
                raise self._ended(
                    f"has another tokenizer than when the run began: id {token} was {quote_value(before)} and is "
                    f"{quote_value(now)}"
                )

    def _ended(self, found: str) -> ServerError:
        return ServerError(f"the teacher's server at {self._server.url} {found}. {REMEDY}")


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean distance of log-probs of the same tokens, in nats."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def _suspicious(logprobs: Sequence[float], vocabulary: int) -> bool:
    """All log-probs are alike, or what no knowledge at all would give."""
    if len(logprobs) < 2:
        return False
    uniform = all(abs(value + math.log(vocabulary)) <= NEAR_UNIFORM for value in logprobs)
    return uniform or alike(logprobs)
