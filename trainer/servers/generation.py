"""Completions of token ids by a vLLM server: ids go out, ids come back, each with its log-prob.

A request spells out every setting that shapes the distribution: the server and the model have defaults of their own.
One prompt a request: vLLM gives all prompts of a request the same seed, and so the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastkl.trainer.data.samples import Completion
from fastkl.trainer.servers.completions import BadAnswer, read_logprob
from fastkl.trainer.servers.connection import Connection

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
    """A server that completes prompts, for one who checks what it answers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.url = connection.url

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
            BadAnswer: For ids that are not of this prompt, or not one log-prob for each.
            ServerError: When there is no answer.
        """
        choice = self._ask(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                "stop_token_ids": list(eos_token_ids),
                "cache_salt": cache_salt,
                "logprobs": 0,  # of the sampled tokens alone
            }
        )
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or choice.get("prompt_token_ids") != prompt:
            raise BadAnswer(f"{self.url} answers without the token ids of prompt and completion (return_token_ids)")
        if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
            raise BadAnswer(f"{self.url} gives {logprobs and len(logprobs)} log-probs for {len(tokens)} sampled tokens")
        ended = bool(tokens) and tokens[-1] in eos_token_ids
        if not (ended or len(tokens) == max_new_tokens):
            raise BadAnswer(
                f"{self.url} ended a completion after {len(tokens)} tokens of {max_new_tokens} with id {tokens[-1:]}, "
                f"which is no end of the student's ({list(eos_token_ids)}); finish_reason {choice.get('finish_reason')!r}"
            )
        values = [read_logprob(value, len(prompt) + index) for index, value in enumerate(logprobs)]
        return Completion(tokens, values, not ended)

    def likeliest(self, model: str, prompt: list[int], temperature: float) -> dict[str, float]:
        """The log-probs that it gives the likeliest next tokens, by `token_id:…`, when it samples at `temperature`."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": temperature, "seed": 0}
        choice = self._ask(body | {"logprobs": LIKELIEST, "return_tokens_as_token_ids": True})
        tops = (choice.get("logprobs") or {}).get("top_logprobs")
        if not tops or not isinstance(tops[0], dict):
            raise BadAnswer(f"{self.url} does not give the log-probs of the likeliest tokens (logprobs: {LIKELIEST})")
        return tops[0]

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = self._connection.post(f"{self.url}/completions", PLAIN | body).get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise BadAnswer(f"{self.url} answered one prompt with {choices!r:.100} for choices")
        return choices[0]
