"""What every objective may count on: its name finds it, and what it writes in the update reaches all processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from launches import give_samples, together
from run_settings import arguments, distillation
from tiny_data import read_jsonl
from torch import Tensor

from fastkl.loss import LossOutput, reverse_kl_loss
from fastkl.trainer.config.loss import LossConfig, ObjectiveName
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.errors import RunError
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.objectives.numbers import numbers_are_checked
from fastkl.trainer.objectives.policy_gradient import PolicyGradient
from fastkl.trainer.objectives.registry import OBJECTIVES


class Notes(PolicyGradient):
    """Leaves numbers in a field of the samples that nothing else writes here."""

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: float, seed: int) -> LossOutput:
        batch.scatter(100 + batch.tokens, "kl_baseline")
        return super().__call__(model, batch, normalizer, seed)


def take_notes() -> None:
    give_samples()
    OBJECTIVES["policy_gradient"] = Notes


def test_every_name_has_an_objective() -> None:
    named = {name for names in get_args(ObjectiveName) for name in (get_args(names) or [names])}
    assert {*OBJECTIVES} == named


@pytest.mark.parametrize(("logprob", "said"), [(math.nan, "holds NaN"), (0.5, "holds 0.5")])
@pytest.mark.parametrize("field", ["sampler_logprobs", "teacher_logprobs"])
def test_numbers_that_no_update_can_be_made_of_end_the_run(field: str, logprob: float, said: str) -> None:
    """In a sentence, on any device; where nothing is counted they may be anything."""
    own = {"sampler_logprobs": [math.nan, -1.0], "teacher_logprobs": [math.nan, -2.0]}
    sample = Sample([1, 2], [False, True], 0, **own)
    set_advantages([sample], LossConfig())
    assert sample.advantages.tolist() == [0.0, -1.0]
    with pytest.raises(RunError, match=f"no update can be made of this step's samples: {field} {said}"):
        set_advantages([Sample([1, 2], [False, True], 0, **own | {field: [0.0, logprob]})], LossConfig())


def test_a_teacher_that_gives_nan_ends_the_run() -> None:
    @numbers_are_checked()
    def loss(hidden: Tensor) -> LossOutput:
        return reverse_kl_loss(torch.zeros(2, 3), torch.zeros(4, 3), hidden, torch.zeros(4, 3))

    assert loss(torch.zeros(2, 3)).loss == 0
    with pytest.raises(RunError, match=r"no update .*: teacher_hidden holds NaN"):
        loss(torch.full((2, 3), math.nan))


def test_what_is_scattered_in_the_update_reaches_all_processes(folder: Path, tmp_path: Path) -> None:
    run = distillation(tmp_path / "run", folder, optim__steps=1, sampling__prompts_per_step=5)
    codes, said = together(arguments("distill", run), tmp_path / "said", before=dict.fromkeys((0, 1), take_notes))
    assert codes == [0, 0], "\n".join(said)
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 5
    for sample in samples:
        told = [
            100 + token if counted else 0 for token, counted in zip(sample["ids"], sample["loss_mask"], strict=True)
        ]
        assert sample["kl_baseline"] == told
