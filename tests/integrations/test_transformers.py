"""The examples of docs/integrations.md in Transformers' Trainer: the weights that a trainer with all the logits gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_trainer import EVALUATED, LOCAL, PER_STEP, SCORED, STEPS, in_process, run, saved_loss
from groups import in_group

slow = pytest.mark.slow
NAMES = {"local": LOCAL, "scored": SCORED}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}
CASES = [(name, kind, options) for name in NAMES for kind in ("full", "lora") for options in OPTIONS]
FAST = [("local", "full", "accumulation"), ("scored", "lora", "checkpointing"), ("local", "lora", "bf16")]
FAST_TOGETHER = [("scored", "full", "accumulation")]


def compare(found: dict[str, Any], wanted: dict[str, Any], rounding: float) -> None:
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=rounding, rtol=0, msg=name)
    assert len(found["losses"]) == STEPS
    for field in ("losses", "evaluations"):
        assert found[field] == pytest.approx(wanted[field], rel=1e3 * rounding, abs=1e3 * rounding)


def marked(fast: list[tuple[str, str, str]]) -> list[Any]:
    return [pytest.param(*case, id="-".join(case), marks=() if case in fast else slow) for case in CASES]


@pytest.mark.parametrize(("name", "kind", "options"), marked(FAST))
def test_one_process(name: str, kind: str, options: str, tmp_path: Path) -> None:
    batch = PER_STEP // OPTIONS[options].get("gradient_accumulation_steps", 1)
    wanted = run(tmp_path / "plain", NAMES[name], kind, batch, plain=True, **OPTIONS[options])
    found = run(tmp_path / "fused", NAMES[name], kind, batch, **OPTIONS[options])
    compare(found, wanted, 1e-3 if options == "bf16" else 1e-5)
    assert len(found["predictions"]) == {"local": 0, "scored": EVALUATED}[name]
    assert saved_loss(tmp_path / "fused", kind) == pytest.approx(saved_loss(tmp_path / "plain", kind), rel=1e-3)
    files = [{path.name for path in (tmp_path / each / f"checkpoint-{STEPS}").iterdir()} for each in ("plain", "fused")]
    assert files[0] == files[1]


def check_together(name: str, kind: str, options: str, folder: Path, fsdp: bool) -> None:
    batch = PER_STEP // OPTIONS[options].get("gradient_accumulation_steps", 1)
    whole = {**OPTIONS[options], "per_device_eval_batch_size": EVALUATED}
    wanted = run(folder / "plain", NAMES[name], kind, batch, plain=True, **whole)
    first, second = in_group(in_process, folder / "fused", NAMES[name], kind, OPTIONS[options], fsdp=fsdp)
    compare(first, wanted, 1e-3 if options == "bf16" else 1e-5)
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])


@pytest.mark.parametrize(("name", "kind", "options"), marked(FAST_TOGETHER))
def test_two_processes(name: str, kind: str, options: str, tmp_path: Path) -> None:
    check_together(name, kind, options, tmp_path, fsdp=False)


@slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_that_shard_the_model(name: str, kind: str, tmp_path: Path) -> None:
    """FSDP 2, loaded as accelerate does by default: the weights on the first process alone."""
    check_together(name, kind, "accumulation", tmp_path, fsdp=True)
