"""Completions of token ids by a vLLM server: ids go out, ids come back, each with its log-prob.

A request spells out every setting that shapes the distribution: the server and the model have defaults of their own.
One prompt a request: vLLM gives all prompts of a request the same seed, and so the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastkl.trainer.data.samples import Completion
from fastkl.trainer.servers.answers import (
    BadAnswer,
    answering,
    as_ids,
    as_list,
    as_logprob,
    as_logprobs,
    as_object,
    by_id,
    choices,
)
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.quoting import quote_value

PLAIN: dict[str, Any] = {
    "n": 1,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # the ids that end a completion are those sent, and no others
    "return_token_ids": True,
}
LIKELIEST = 5


class GenerationServer:
    """A server that completes prompts; what it answers is checked.

    Args:
        vocab_size: The student's head has the ids below this one.
    """

    def __init__(self, connection: Connection, vocab_size: int) -> None:
        self._connection, self._vocab_size = connection, vocab_size
        self.url, self.whose = connection.url, connection.whose

    def complete(
        self,
        model: str,
        prompt: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        eos_token_ids: Sequence[int],
        cache_salt: str,
    ) -> Completion:
        """One completion; its log-probs are those at `temperature` (at 1 when greedy), from a server found fit.

        Args:
            model: The served model, or a LoRA adapter.
            seed: 0 … 2⁶³ − 1.
            eos_token_ids: The ids that end it.
            cache_salt: Keys and values in the server's cache are used again under the same salt only.

        Raises:
            BadAnswer: For ids that are not of this prompt, or no completion of it, or not one log-prob for each.
            ServerError: When there is no answer.
        """
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop_token_ids": list(eos_token_ids),
            "cache_salt": cache_salt,
            "logprobs": 0,  # of the sampled tokens alone
        }
        with answering(self._connection.whose, self.url):
            choice = self._ask(body, len(prompt) + 3 * max_new_tokens)
            tokens = self._tokens(choice, prompt)
            _check_end(tokens, max_new_tokens, eos_token_ids, choice)
            return Completion(tokens, _logprobs(choice, prompt, tokens), tokens[-1] not in eos_token_ids)

    def likeliest(self, model: str, prompt: list[int], temperature: float) -> dict[int, float]:
        """The log-probs that it gives the likeliest next tokens, by their ids, when it samples at `temperature`."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": temperature, "seed": 0}
        with answering(self._connection.whose, self.url):
            choice = self._ask(body | {"logprobs": LIKELIEST, "return_tokens_as_token_ids": True}, len(prompt) + 3)
            tops = _beside(choice, "top_logprobs")
            if not tops or tops[0] is None:
                raise BadAnswer(f"it does not give the log-probs of the likeliest tokens (logprobs: {LIKELIEST})")
            return by_id(as_logprobs(tops[0], len(prompt)))

    def _ask(self, body: dict[str, Any], entries: int) -> dict[str, Any]:
        (choice,) = choices(self._connection.post(f"{self.url}/completions", PLAIN | body, entries), 1)
        return choice

    def _tokens(self, choice: dict[str, Any], prompt: list[int]) -> list[int]:
        if choice.get("token_ids") is None or choice.get("prompt_token_ids") != prompt:
            raise BadAnswer("it is without the token ids of prompt and completion (return_token_ids)")
        return as_ids(choice["token_ids"], "the completion", self._vocab_size)


def _check_end(tokens: list[int], most: int, eos_token_ids: Sequence[int], choice: dict[str, Any]) -> None:
    """It ends with the first end, or after as many tokens as were asked for."""
    if len(tokens) > most:
        raise BadAnswer(f"it has {len(tokens)} tokens where {most} were asked for at most")
    for place, token in enumerate(tokens[:-1]):
        if token in eos_token_ids:
            raise BadAnswer(f"it goes on after id {token}, an end, at token {place} of {len(tokens)}")
    if not (tokens and tokens[-1] in eos_token_ids) and len(tokens) < most:
        raise BadAnswer(
            f"it ended after {len(tokens)} tokens of {most} with id {tokens[-1:]}, which is no end of the student's "
            f"({list(eos_token_ids)}); finish_reason {quote_value(choice.get('finish_reason'))}"
        )


def _logprobs(choice: dict[str, Any], prompt: list[int], tokens: list[int]) -> list[float]:
    found = _beside(choice, "token_logprobs")
    if len(found) != len(tokens):
        raise BadAnswer(f"it has {len(found)} log-probs for {len(tokens)} sampled tokens")
    values = [as_logprob(value, len(prompt) + place) for place, value in enumerate(found)]
    if -math.inf in values:
        raise BadAnswer(f"its token {values.index(-math.inf)} has the log-prob −inf, and was sampled all the same")
    return values


def _beside(choice: dict[str, Any], name: str) -> list[Any]:
    """A list in the choice's `logprobs`; empty where there is none."""
    logprobs = choice.get("logprobs")
    values = None if logprobs is None else as_object(logprobs, "logprobs").get(name)
    return [] if values is None else as_list(values, name)
