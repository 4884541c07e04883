"""A teacher behind HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastkl.loss import TopK
from fastkl.trainer.config.teacher import TeacherConfig, TeacherServerConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.samples import NO_NUMBERS, UNKNOWN, Sample
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.notes import note
from fastkl.trainer.runs import processes
from fastkl.trainer.servers.answers import BadAnswer, Unscored
from fastkl.trainer.servers.check import TOLERANCE, check_server
from fastkl.trainer.servers.check_listed import check_listed
from fastkl.trainer.servers.completions import CompletionsServer, Scores
from fastkl.trainer.servers.concurrency import gather
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.constant import MANY
from fastkl.trainer.servers.listed import ListServer
from fastkl.trainer.servers.quoting import quote_value
from fastkl.trainer.servers.recheck import Recheck, Reference
from fastkl.trainer.servers.token_texts import TokenTexts
from fastkl.trainer.teachers.cache.fingerprints import server_fingerprint
from fastkl.trainer.teachers.cache.store import Store
from fastkl.trainer.teachers.early import Early
from fastkl.trainer.teachers.lists import joined


class ServedTeacher:
    """Scores by asking a server that `check_server` has found fit (see `Teacher`), and sees whether it stays so.

    Args:
        server: Where to ask.
        config: How many samples at once, and how often the server is checked.
        reference: What it answered at the start.
        tokenizer: The one whose ids are sent: the teacher knows no others.
        longest: The most tokens that it is known to score.
        lists: Where to ask about the ids that the student lists.
    """

    def __init__(
        self,
        server: CompletionsServer,
        config: TeacherServerConfig,
        reference: Reference,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        lists: ListServer | None = None,
    ) -> None:
        self.longest = longest
        self._server, self._config, self._reference, self._lists = server, config, reference, lists
        self._vocabulary, self._top_k = vocabulary(tokenizer), reference.top_k
        self.vocab_size: int | None = self._vocabulary
        self._texts = TokenTexts(tokenizer)
        self._names_tokens = not self._texts.differing(reference.ids, reference.scores.texts)  # as the tokenizer does
        self._early = Early(self._ask, config.sequences_per_request, config.concurrency)
        self._recheck = Recheck(server, reference, config.recheck_every)

    def score(self, samples: Sequence[Sample]) -> None:
        answers = self._answers(samples)
        listed = [] if self._lists is None else gather(self._ask_lists, samples, self._config.concurrency)
        self._check(samples, answers)
        self._check_lists(samples, answers, listed)
        for sample, scored in zip(samples, answers, strict=True):
            known = sample.ids < self._vocabulary
            sample.teacher_logprobs = np.where(sample.loss_mask, np.where(known, scored.logprobs, UNKNOWN), 0.0)
            ranks = np.where(sample.loss_mask & known, [rank or 0 for rank in scored.ranks], 0)
            sample.teacher_ranks = ranks if ranks.any() else NO_NUMBERS
            if self._top_k is not None:
                sample.teacher_top_k = self._likeliest(list(itertools.compress(scored.top, sample.loss_mask)))
        for sample, found in zip(samples, listed, strict=False):
            own = [] if self._top_k is None or sample.teacher_top_k is None else [sample.teacher_top_k]
            lists = joined([*own, found])
            sample.teacher_top_k = TopK(lists.ids.int(), lists.logprobs)

    def ask_early(self, sample: Sample) -> None:
        """Asks about a sample that `score` will get; by any thread."""
        self._early.add(tuple(self._readable(sample)), sample)

    def close(self) -> None:
        """Nobody will ask for scores any more."""
        self._early.close()

    def _answers(self, samples: Sequence[Sample]) -> list[Scores]:
        """What the server says: of samples about which it was asked early, and of the rest, about which it is asked now."""
        keys = [tuple(self._readable(sample)) for sample in samples]
        early = [self._early.find(key) for key in keys]
        rest = [sample for sample, answer in zip(samples, early, strict=True) if answer is None]
        size = self._config.sequences_per_request
        groups = [rest[first : first + size] for first in range(0, len(rest), size)]
        asked = itertools.chain.from_iterable(gather(self._ask, groups, self._config.concurrency))
        answers = [next(asked) if answer is None else answer.result() for answer in early]
        self._early.forget(keys)
        return answers

    def rank(self, samples: Sequence[Sample], vocab_size: int) -> None:
        pass  # see `score`: to ask again could fail, and would tell the same

    def score_plain(self, samples: Sequence[Sample]) -> None:
        pass  # as `rank`

    def recheck(self) -> None:
        self._recheck.at_the_end()

    def fingerprint(self, store: Store) -> str:
        """The name that a cache of scores has for what this server has shown of its model."""
        return server_fingerprint(self._server, self._reference, store)

    def _likeliest(self, places: list[dict[int, float]]) -> TopK:
        """The lists of some places as tensors. Ids beyond the tokenizer, and what a list is short of, are padding."""
        assert self._top_k is not None
        ids = torch.full((len(places), self._top_k), -1, dtype=torch.int32)
        logprobs = torch.zeros(len(places), self._top_k)
        for row, place in enumerate(places):
            known = {token: value for token, value in place.items() if token < self._vocabulary}
            if not known:
                raise BadAnswer(f"{self._server.url} lists no token that the student knows, in one place")
            ids[row, : len(known)] = torch.tensor(list(known), dtype=torch.int32)
            logprobs[row, : len(known)] = torch.tensor(list(known.values()))
        return TopK(ids, logprobs)

    def state_dict(self) -> dict[str, Any]:
        return self._recheck.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ServerError on all processes if the server has another model than when the run began."""
        processes.raise_together(lambda: self._recheck.load_state_dict(state))

    def flops(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {}  # a server does not say how large its model is

    def _ask(self, samples: Sequence[Sample]) -> list[Scores]:
        reference = self._reference
        sent = [self._readable(sample) for sample in samples]
        try:
            answers = self._server.score(sent, reference.api, reference.temperature, reference.top_k)
        except Unscored as error:
            raise BadAnswer(
                f"the teacher's server at {self._server.url} gives no log-probs any more: {error}"
            ) from error
        for ids, answer in zip(sent, answers, strict=True):
            self._check_texts(ids, answer)
        return answers

    def _ask_lists(self, sample: Sample) -> TopK:
        """The ids that the student listed for the counted tokens, with the teacher's log-probs."""
        assert self._lists is not None
        assert sample.student_top_k is not None
        if sample.student_top_k.numel() == 0:
            return TopK(sample.student_top_k, torch.zeros(sample.student_top_k.shape))
        rows = iter(sample.student_top_k.tolist())
        lists = [next(rows) if counted else [] for counted in sample.loss_mask]
        scored = self._lists.score(self._readable(sample), lists, self._reference.temperature)
        return TopK(sample.student_top_k, torch.tensor([*itertools.compress(scored, sample.loss_mask)]))

    def _check_lists(self, samples: Sequence[Sample], answers: Sequence[Scores], listed: Sequence[TopK]) -> None:
        """Compares what both answers say of the tokens that are on the student's lists."""
        apart: list[float] = []
        for sample, answer, found in zip(samples, answers, listed, strict=False):
            tokens = torch.from_numpy(sample.ids[sample.loss_mask])[:, None]
            ordinary = torch.tensor([*itertools.compress(answer.logprobs, sample.loss_mask)])[:, None]
            distance = (found.logprobs - ordinary).abs()
            apart += distance[(found.ids == tokens) & distance.isfinite()].tolist()
        if len(apart) >= MANY and sum(apart) / len(apart) > TOLERANCE:
            raise BadAnswer(
                f"the teacher's server at {self._server.url} gives ids that are sent to it other log-probs than it gives "
                f"them in its ordinary answer, {sum(apart) / len(apart):.2f} nats apart on average over {len(apart)} tokens"
            )

    def _readable(self, sample: Sample) -> list[int]:
        ids: list[int] = np.where(sample.ids < self._vocabulary, sample.ids, PAD_ID).tolist()
        return ids

    def _check_texts(self, ids: list[int], answer: Scores) -> None:
        differing = self._texts.differing_words(ids, answer.texts) if self._names_tokens else []
        for token, ours, theirs in differing[:1]:
            raise BadAnswer(
                f"the teacher's server at {self._server.url} was sent id {token}, {ours!r}, and scored "
                f"{quote_value(theirs)}: its log-probs are of another sequence, or it has another tokenizer by now"
            )

    def _check(self, samples: Sequence[Sample], answers: Sequence[Scores]) -> None:
        counted = [
            (token, logprob)
            for sample, answer in zip(samples, answers, strict=True)
            for token, counts, logprob in zip(sample.ids.tolist(), sample.loss_mask, answer.logprobs, strict=True)
            if counts and token < self._vocabulary
        ]
        tokens, logprobs = [token for token, _ in counted], [logprob for _, logprob in counted]
        self._recheck.after_step(tokens, logprobs, self._vocabulary)


def connect(
    config: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    longest: list[int],
    remedy: str,
    top_k: int | None = None,
    top_k_setting: str = "loss.top_k",
    listed: int | None = None,
) -> ServedTeacher:
    """A teacher whose server has shown what `check_server` asks of it, and `check_listed` where ids will be `listed`."""
    note(f"asking the teacher's server {config.server.url}")
    connection = Connection(config.server, "the teacher's server")
    server = CompletionsServer(config.server.model, connection)
    reference = check_server(
        server,
        config.server,
        tokenizer,
        trusted=config.tokenizer is not None,
        temperature=temperature,
        longest=longest,
        remedy=remedy,
        top_k=top_k,
        top_k_setting=top_k_setting,
        own=config.tokenizer if config.own_tokenizer else None,
    )
    most = max(len(longest), (server.context() or 0) - 1)  # a token is generated too
    if listed is None:
        return ServedTeacher(server, config.server, reference, tokenizer, most)
    lists = ListServer(config.server.model, connection)
    check_listed(server, lists, reference, listed, vocabulary(tokenizer), longest, remedy)
    return ServedTeacher(server, config.server, reference, tokenizer, most, lists)
