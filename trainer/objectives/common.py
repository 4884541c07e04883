"""A student's distributions beside those of a model with another tokenizer: the tokens that both have, and the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.loss import CommonLogits, common_vocabulary_logits
from fastkl.trainer.data.arrays import Array, end_to_end
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.models.scoring import check_finite, token_logprobs
from fastkl.trainer.teachers.alignment.common import CommonVocabulary
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.several import as_read


class CommonComparison:
    """A teacher that has read the samples of a batch in its own tokens; its log-probs of those go into the samples.

    Where the two do not begin a token at one place, nothing is compared: such tokens have the weight 0.
    """

    def __init__(self, teacher: LocalTeacher, common: CommonVocabulary, batch: Batch, temperature: float) -> None:
        self._temperature, self._ids = temperature, (common.student_ids, common.teacher_ids)
        device, samples = batch.tokens.device, batch.samples
        with as_read(samples) as read:
            head = teacher.head(read, device)
            tokens = torch.from_numpy(end_to_end([each.ids[each.loss_mask] for each in read], np.int64)).to(device)
            logprobs = token_logprobs(head.hidden, head.weight, tokens, temperature, head.options)
            dataclasses.replace(batch, samples=read).scatter(check_finite(logprobs, "teacher"), "teacher_logprobs")
        begun = _among([each.teacher_compared for each in samples], [each.teacher_scored for each in samples])
        places = _among([each.compared for each in samples], [each.loss_mask for each in samples])
        hidden = head.hidden.new_zeros(len(places), head.hidden.shape[1])
        hidden[places.to(device)] = head.hidden[begun.to(device)]
        self._head = head._replace(hidden=hidden)

    def logits(self, rows: Tensor, weight: Tensor, head: dict[str, Any]) -> CommonLogits:
        """What the losses take as the teacher's, for the student's hidden states [n, D] and head [V, D]."""
        theirs = {f"teacher_{name}": value for name, value in self._head.options.items()}
        student_ids, teacher_ids = (each.to(rows.device) for each in self._ids)
        heads = rows, weight, self._head.hidden, self._head.weight
        options: dict[str, Any] = {"temperature": self._temperature, **head, **theirs}
        return common_vocabulary_logits(*heads, student_ids, teacher_ids, **options)


def _among(chosen: Sequence[Array], counted: Sequence[Array]) -> Tensor:
    """bool: which of the tokens that count are chosen, of all samples end to end."""
    return torch.from_numpy(end_to_end([a[b] for a, b in zip(chosen, counted, strict=True)], np.bool_))
