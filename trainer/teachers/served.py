"""A teacher behind HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from fastkl.loss import TopK
from fastkl.trainer.config.teacher import TeacherConfig, TeacherServerConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.samples import UNKNOWN, Sample
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.servers.check import check_server
from fastkl.trainer.servers.completions import Api, BadAnswer, CompletionsServer, Scores
from fastkl.trainer.servers.concurrency import gather
from fastkl.trainer.servers.connection import Connection


class ServedTeacher:
    """Scores by asking a server that `check_server` has found fit (see `Teacher`).

    Args:
        server: Where to ask.
        config: How many samples at once.
        api: How to ask.
        vocabulary: The teacher knows the ids below this one.
        temperature: That of the log-probs.
        top_k: Ask for so many of the likeliest tokens too; null for none.
    """

    def __init__(
        self,
        server: CompletionsServer,
        config: TeacherServerConfig,
        api: Api,
        vocabulary: int,
        temperature: float,
        top_k: int | None = None,
    ) -> None:
        self._server, self._config, self._api = server, config, api
        self.vocab_size: int | None = vocabulary
        self._vocabulary, self._temperature, self._top_k = vocabulary, temperature, top_k

    def score(self, samples: Sequence[Sample]) -> None:
        size = self._config.sequences_per_request
        groups = [samples[first : first + size] for first in range(0, len(samples), size)]
        answers = gather(self._ask, groups, self._config.concurrency)
        for sample, scored in zip(samples, itertools.chain.from_iterable(answers), strict=True):
            sample.teacher_logprobs = [
                0.0 if not counted else logprob if token < self._vocabulary else UNKNOWN
                for token, counted, logprob in zip(sample.ids, sample.loss_mask, scored.logprobs, strict=True)
            ]
            ranks = [
                (rank or 0) if counted and token < self._vocabulary else 0
                for token, counted, rank in zip(sample.ids, sample.loss_mask, scored.ranks, strict=True)
            ]
            sample.teacher_ranks = ranks if any(ranks) else []
            if self._top_k is not None:
                sample.teacher_top_k = self._likeliest(list(itertools.compress(scored.top, sample.loss_mask)))

    def rank(self, samples: Sequence[Sample], vocab_size: int) -> None:
        pass  # see `score`: to ask again could fail, and would tell the same

    def _likeliest(self, places: list[dict[int, float]]) -> TopK:
        """The lists of some places as tensors. Ids beyond the tokenizer, and what a list is short of, are padding."""
        assert self._top_k is not None
        ids = torch.full((len(places), self._top_k), -1)
        logprobs = torch.zeros(len(places), self._top_k)
        for row, place in enumerate(places):
            known = {token: value for token, value in place.items() if token < self._vocabulary}
            if not known:
                raise BadAnswer(f"{self._server.url} lists no token that the student knows, in one place")
            ids[row, : len(known)] = torch.tensor(list(known))
            logprobs[row, : len(known)] = torch.tensor(list(known.values()))
        return TopK(ids, logprobs)

    def flops(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {}  # a server does not say how large its model is

    def _ask(self, samples: Sequence[Sample]) -> list[Scores]:
        readable = [[token if token < self._vocabulary else PAD_ID for token in sample.ids] for sample in samples]
        return self._server.score(readable, self._api, self._temperature, self._top_k)


def connect(
    config: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    longest: list[int],
    remedy: str,
    top_k: int | None = None,
) -> ServedTeacher:
    """A teacher whose server has shown what `check_server` asks of it."""
    server = CompletionsServer(config.server.model, Connection(config.server, "the teacher's server"))
    api = check_server(
        server,
        config.server,
        tokenizer,
        trusted=config.tokenizer is not None,
        temperature=temperature,
        longest=longest,
        remedy=remedy,
        top_k=top_k,
    )
    return ServedTeacher(server, config.server, api, vocabulary(tokenizer), temperature, top_k)
