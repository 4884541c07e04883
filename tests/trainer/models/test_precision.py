"""Weights of 16 bits that updates do not reach: they are counted, and a run says so once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_cases import run
from tiny_models import causal_lm

from fastkl.trainer.models.precision import Counts, too_small_an_update, unchanged_fraction


def share_left(dtype: torch.dtype, lr: float) -> dict[str, float]:
    """After one step of AdamW with the gradient 1 everywhere but in the embedding, which has none."""
    model = causal_lm(tie_word_embeddings=False).to(dtype)
    embedding = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * (parameter is not embedding)
    counts = Counts(model.parameters())
    with counts.around_step():
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0).step()
    return unchanged_fraction([(counts.seen, counts.unchanged), (0, 0)])


def test_what_an_update_leaves() -> None:
    assert share_left(torch.bfloat16, 1.0) == {"optim/unchanged": 0.0}
    assert share_left(torch.bfloat16, 1e-6)["optim/unchanged"] > 0.9
    assert share_left(torch.bfloat16, 1e-3)["optim/unchanged"] < 0.3
    assert share_left(torch.float32, 1e-6) == {}


@pytest.mark.parametrize(("lr", "said"), [(1e-6, True), (1e-2, False)])
def test_a_run_says_that_its_weights_cannot_hold_the_updates(
    tmp_path: Path, padded: Path, lr: float, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"student__dtype": "bfloat16", "optim__warmup_steps": 2, "optim__lr": lr}
    done = run(tmp_path / "run", padded, **options)
    assert all((row["optim/unchanged"] > 0.5) == said for row in done.metrics)
    lines = [line for line in capsys.readouterr().err.splitlines() if "did not change in this update" in line]
    assert len(lines) == said
    assert all("student.dtype to float32 (with mixed_precision bf16)" in line for line in lines)


def test_no_rate_no_warning() -> None:
    assert too_small_an_update({"optim/unchanged": 1.0}, 0.0) is None
    assert too_small_an_update({}, 1e-6) is None
