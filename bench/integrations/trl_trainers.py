"""TRL's trainers, with `fastkl.integrations.trl.use()` and without. Nothing else differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.integrations import PROMPT, Job, Kind

Row = dict[str, Any]


def of_words(job: Job, vocabulary: int) -> list[Row]:
    return [{"text": text} for text in job.texts(job.tokens + 1, vocabulary)]


def prompts(job: Job, vocabulary: int) -> list[Row]:
    return [{"prompt": text} for text in job.texts(PROMPT, vocabulary)]


def preferences(job: Job, vocabulary: int) -> list[Row]:
    answers = job.texts(job.tokens, vocabulary, 2 * job.rows * job.steps)
    pairs = zip(job.texts(PROMPT, vocabulary), answers[::2], answers[1::2], strict=True)
    return [{"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]


def judged(job: Job, vocabulary: int) -> list[Row]:
    pairs = zip(job.texts(PROMPT, vocabulary), job.texts(job.tokens, vocabulary), strict=True)
    return [{"prompt": f"{p} ", "completion": c, "label": index % 2 == 0} for index, (p, c) in enumerate(pairs)]


def sevens(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions of any length: the number of sevens."""
    return [float(completion.count("7")) for completion in completions]


def build(
    name: str,
    data: Callable[[Job, int], list[Row]],
    job: Job,
    *,
    sampled: bool = False,
    share: int = 1,
    settings: Row | None = None,
    arguments: Callable[[Job], Row] = lambda job: {},
) -> Any:
    """`share`: the rows that one example makes."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    values = job.arguments() | (settings or {})
    values["per_device_train_batch_size"] //= share
    if sampled:
        values["max_completion_length"] = job.tokens
    config = getattr(trl, f"{name}Config")(**values)
    words = len(AutoTokenizer.from_pretrained(job.student))
    trainer = getattr(trl, f"{name}Trainer")
    rows = Dataset.from_list(data(job, words))
    return trainer(model=job.student, args=config, train_dataset=rows, **arguments(job))


@contextmanager
def no_head() -> Iterator[None]:
    """The fused head and the divergence give constants, with gradients of 0 for the hidden states."""
    with (
        mock.patch("trl.trainer.utils._ChunkedLogProbFunction", _NoTokenFields),
        mock.patch("trl.trainer.distillation_trainer._chunked_divergence_loss", _no_divergence),
    ):
        yield


class _NoTokenFields:
    @staticmethod
    def apply(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
        ones = torch.ones(len(hidden), device=hidden.device)
        return 0.0 * hidden.sum(-1) - 1.0, ones, -ones, ones, ones.bool()


def _no_divergence(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return 0.0 * hidden.sum(), torch.zeros(()), torch.ones(())


def _use() -> Any:
    from fastkl.integrations.trl import use

    return use()


def _kind(name: str, data: Callable[[Job, int], list[Row]], **options: Any) -> Kind:
    return Kind(partial(build, name, data, **options), _use, no_head)


def _teacher(job: Job) -> Row:
    return {"teacher_model": f"{job.pair}/teacher"}


def _reward(job: Job) -> Row:
    return {"reward_funcs": sevens}


_distillation = partial(_kind, "Distillation", prompts, sampled=True, arguments=_teacher)
_policy_gradient = partial(_kind, data=prompts, sampled=True, arguments=_reward, settings={"num_generations": 4})
KINDS = {
    "distillation": _distillation(settings={"beta": 1.0}),  # TRL's default, the reverse KL
    "distillation_jsd": _distillation(settings={"beta": 0.5}),
    "sft": _kind("SFT", of_words),
    "grpo": _policy_gradient("GRPO"),
    "rloo": _policy_gradient("RLOO"),
    "dpo": _kind("DPO", preferences, share=2),
    "kto": _kind("KTO", judged),
}
