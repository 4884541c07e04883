"""Transformers' Trainer with the model's own loss, or with `fuse` and `linear_cross_entropy` (docs/integrations.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from bench.integrations import Job, Kind
from fastkl.head import fuse
from fastkl.loss import linear_cross_entropy


class Switched(Trainer):
    """Its loss is the model's, or what `instead` makes of hidden states, weight, targets, normalizer and the rest."""

    instead: Any = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.instead is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs.pop("labels")[:, 1:]

        def loss(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
            return type(self).instead(hidden[:, :-1], weight, targets, normalizer=num_items_in_batch, **head)

        return model(**inputs, fused=loss)


def build(job: Job) -> Switched:
    tokenizer = AutoTokenizer.from_pretrained(job.student)
    texts = job.texts(job.tokens + 1, len(tokenizer))
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
    model = fuse(AutoModelForCausalLM.from_pretrained(job.student))
    arguments = TrainingArguments(**job.arguments())
    return Switched(model=model, args=arguments, train_dataset=rows)


@contextmanager
def instead(loss: Any) -> Iterator[None]:
    Switched.instead = staticmethod(loss)
    try:
        yield
    finally:
        Switched.instead = None


def cross_entropy(*terms: Tensor, **options: Any) -> Tensor:
    return linear_cross_entropy(*terms, **options).loss


def nothing(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return 0.0 * hidden.sum()


KINDS = {"transformers": Kind(build, lambda: instead(cross_entropy), lambda: instead(nothing))}
