"""A teacher that is asked once: what it said is kept in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.teachers.cache import entries
from fastkl.trainer.teachers.cache.fingerprints import model_fingerprint
from fastkl.trainer.teachers.cache.store import Store
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import ServedTeacher
from fastkl.trainer.teachers.teacher import Lists

FORMAT = 1  # another one where entries mean something else
Cacheable: TypeAlias = LocalTeacher | ServedTeacher
SCORES = ("teacher_logprobs", "teacher_ranks", "teacher_top_k")


class CachedTeacher:
    """What a teacher says of samples (see `Teacher.score`), read from a store where it was said before.

    Args:
        teacher: Asked about the others, whose scores are stored once `Teacher.recheck` has passed.
        identity: What tells its model and ways from others; called once, when the teacher can be used.
        asked: What it is asked, beside the samples.
    """

    def __init__(self, teacher: Cacheable, store: Store, identity: Callable[[], str], asked: Sequence[object]) -> None:
        self._teacher, self._store, self._identity, self._asked = teacher, store, identity, asked
        self._name: str | None = None

    def score(self, samples: Sequence[Sample]) -> None:
        """Also writes into `teacher_cached` whether the teacher was spared."""

        def ask(new: list[Sample]) -> None:
            self._teacher.score(new)
            self._teacher.recheck()  # what a server says that has changed is not kept

        spared = self._through("score", samples, SCORES, ask)
        for sample, cached in zip(samples, spared, strict=True):
            sample.teacher_cached = cached

    def rank(self, samples: Sequence[Sample], vocab_size: int) -> None:
        if isinstance(self._teacher, LocalTeacher):  # a server's came with the scores
            local = self._teacher
            self._through(f"rank {vocab_size}", samples, SCORES[1:2], lambda new: local.rank(new, vocab_size))

    def score_plain(self, samples: Sequence[Sample]) -> None:
        if isinstance(self._teacher, LocalTeacher):
            self._through("score_plain", samples, ("plain_logprobs",), self._teacher.score_plain)

    def _through(
        self, what: str, samples: Sequence[Sample], fields: Sequence[str], ask: Callable[[list[Sample]], None]
    ) -> list[bool]:
        """Writes the fields of all samples; of equal ones the first is asked about. Which ones are not?"""
        keys = [self._key(what, sample) for sample in samples]
        found = self._store.get({*keys})
        new: dict[bytes, Sample] = {}
        spared = []
        for key, sample in zip(keys, samples, strict=True):
            spared.append(key in new or self._restored(sample, found.get(key)))
            if not spared[-1]:
                new[key] = sample
        if new:
            ask([*new.values()])
            written = {key: entries.pack(sample, fields) for key, sample in new.items()}
            self._store.put(written)
            for key, sample in zip(keys, samples, strict=True):
                if key in new and sample is not new[key]:
                    entries.restore(sample, written[key])
        return spared

    def _restored(self, sample: Sample, content: bytes | None) -> bool:
        if content is None:
            return False
        try:
            entries.restore(sample, content)
        except entries.Damaged:
            self._store.damaged()
            return False
        return True

    def _key(self, what: str, sample: Sample) -> bytes:
        if self._name is None:
            self._name = self._identity()
        listed = sample.student_top_k
        ids = sample.ids.astype(np.int64)
        parts = [ids.tobytes(), sample.loss_mask.tobytes()]
        parts += [] if listed is None else [listed.numpy().astype(np.int64).tobytes()]
        head = [FORMAT, self._name, what, *self._asked, len(ids), None if listed is None else [*listed.shape]]
        digest = hashlib.sha256(json.dumps(head).encode())
        for part in parts:
            digest.update(part)
        return digest.digest()


def cached(
    config: TeacherConfig, teacher: Cacheable, lists: Lists, temperature: float, precision: str = "no"
) -> CachedTeacher | None:
    """A teacher with the cache that its settings name; None where they name none.

    Args:
        lists: What it is asked for beside the log-probs of tokens.
        precision: The autocast that it scores under.
    """
    if config.cache is None:
        return None
    store = Store(Path(config.cache).expanduser(), config.cache_gigabytes * 1e9)
    asked = [repr(temperature), lists.teacher, lists.student, lists.with_token, teacher.vocab_size]
    if isinstance(teacher, LocalTeacher):
        model = teacher.model
        return CachedTeacher(teacher, store, lambda: model_fingerprint(model), [*asked, precision])
    return CachedTeacher(teacher, store, partial(teacher.fingerprint, store), asked)


def spared_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """How many samples the teachers were spared, and how many not; nothing where there is no cache."""
    asked = [sample.teacher_cached for sample in samples if sample.teacher_cached is not None]
    return {"teacher_cache/hits": sum(asked), "teacher_cache/misses": len(asked) - sum(asked)} if asked else {}
