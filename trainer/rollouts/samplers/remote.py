"""Sampling from a model that a vLLM server holds, as it is: nothing is pushed there."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence

from fastkl.trainer.data.samples import Completion
from fastkl.trainer.errors import ServerError
from fastkl.trainer.servers.concurrency import gather
from fastkl.trainer.servers.constant import meaningless
from fastkl.trainer.servers.generation import GenerationServer


class Ended(Exception):
    """Nobody waits for the completions any more."""


class RemoteSampler:
    """Asks a server for completions (see `Sampler`). Of several processes the first alone asks.

    Args:
        name: The served model.
        salt: Keys and values in the server's cache are used again under the same salt only.
        over: Once it is set, nothing more is asked, and `sample` raises Ended. None: it never is.
    """

    shared = False

    def __init__(
        self,
        server: GenerationServer,
        name: str,
        eos_token_ids: Iterable[int],
        concurrency: int,
        salt: str,
        over: threading.Event | None = None,
    ) -> None:
        self._over = over
        self._server, self._name, self._eos = server, name, sorted(set(eos_token_ids))
        self._concurrency, self._salt = concurrency, salt

    def refresh(self) -> None:
        """Nothing to do: the server has its own weights."""

    def sample(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        arrived: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt; a ServerError says why the server gives none.

        `arrived` is told each with its place as soon as it is there, by any thread.
        """
        completions = self.ask(prompts, max_new_tokens, temperature, seed, arrived)
        check_meaning(self._server, completions)
        return completions

    def ask(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        arrived: Callable[[int, Completion], None] | None,
    ) -> list[Completion]:
        """The same, whatever the server gives."""

        def complete(index: int) -> Completion:
            if self._over is not None and self._over.is_set():
                raise Ended
            completion = self._server.complete(
                self._name,
                prompts[index],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=request_seed(seed, index),
                eos_token_ids=self._eos,
                cache_salt=self._salt,
            )
            if arrived is not None:
                arrived(index, completion)
            return completion

        return gather(complete, range(len(prompts)), self._concurrency)


def check_meaning(server: GenerationServer, completions: Sequence[Completion]) -> None:
    """Refuses log-probs that are those of no model, and with them the tokens."""
    tokens = [token for completion in completions for token in completion.token_ids]
    logprobs = [logprob for completion in completions for logprob in completion.logprobs]
    if meaningless(tokens, logprobs):
        raise ServerError(
            f"{server.whose} at {server.url} gives all {len(tokens)} tokens that it sampled the same log-prob, "
            f"{logprobs[0]:.2f}: they are not those of a model. Serve the model with vLLM, and give the same command"
        )


def request_seed(seed: int, index: int) -> int:
    """A seed of its own for every request: 63 bits, the same for the same two numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1
