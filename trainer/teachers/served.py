"""A teacher behind HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.teacher import ServerConfig, TeacherConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.servers.check import check_server
from fastkl.trainer.servers.completions import Api, CompletionsServer, Scores
from fastkl.trainer.servers.concurrency import gather
from fastkl.trainer.teachers.teacher import UNKNOWN


class ServedTeacher:
    """Scores by asking a server that `check_server` has found fit (see `Teacher`).

    Args:
        server: Where to ask.
        config: How many samples at once.
        api: How to ask.
        vocabulary: The teacher knows the ids below this one.
        temperature: That of the log-probs.
    """

    def __init__(
        self, server: CompletionsServer, config: ServerConfig, api: Api, vocabulary: int, temperature: float
    ) -> None:
        self._server, self._config, self._api = server, config, api
        self._vocabulary, self._temperature = vocabulary, temperature

    def score(self, samples: Sequence[Sample]) -> None:
        size = self._config.sequences_per_request
        groups = [samples[first : first + size] for first in range(0, len(samples), size)]
        answers = gather(self._ask, groups, self._config.concurrency)
        for sample, scored in zip(samples, itertools.chain.from_iterable(answers), strict=True):
            sample.teacher_logprobs = [
                0.0 if not counted else logprob if token < self._vocabulary else UNKNOWN
                for token, counted, logprob in zip(sample.ids, sample.loss_mask, scored.logprobs, strict=True)
            ]

    def flops(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {}  # a server does not say how large its model is

    def _ask(self, samples: Sequence[Sample]) -> list[Scores]:
        readable = [[token if token < self._vocabulary else PAD_ID for token in sample.ids] for sample in samples]
        return self._server.score(readable, self._api, self._temperature)


def connect(
    config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, *, temperature: float, longest: list[int], remedy: str
) -> ServedTeacher:
    """A teacher whose server has shown what `check_server` asks of it."""
    server = CompletionsServer(config.server)
    api = check_server(
        server,
        config.server,
        tokenizer,
        trusted=config.tokenizer is not None,
        temperature=temperature,
        longest=longest,
        remedy=remedy,
    )
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    return ServedTeacher(server, config.server, api, vocabulary, temperature)
