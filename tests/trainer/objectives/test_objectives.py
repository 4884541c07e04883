"""What every objective may count on: its name finds it, and what it writes in the update reaches all processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from launches import give_samples, together
from run_settings import arguments, distillation
from tiny_data import read_jsonl

from fastkl.loss import LossOutput
from fastkl.trainer.config.loss import ObjectiveName
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.objectives.policy_gradient import PolicyGradient
from fastkl.trainer.objectives.registry import OBJECTIVES


class Notes(PolicyGradient):
    """Leaves a field of its own in the samples."""

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: int, seed: int) -> LossOutput:
        batch.scatter(100 + batch.tokens, "notes")
        return super().__call__(model, batch, normalizer, seed)


def take_notes() -> None:
    give_samples()
    OBJECTIVES["policy_gradient"] = Notes


def test_every_name_has_an_objective() -> None:
    named = {name for names in get_args(ObjectiveName) for name in (get_args(names) or [names])}
    assert {*OBJECTIVES} == named


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
        assert sample["notes"] == told
