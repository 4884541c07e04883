"""The ways in which the model learns: from its own scores, from its controls, and from what it wrote with the context."""

from __future__ import annotations

from pathlib import Path

from outputs import prepare_outputs
from parts import HERE, Part, Row
from series import fastkl, total_flops

SAMPLED_TOKENS = {"objective": "policy_gradient", "top_k_direction": "reverse"}
LOSSES: dict[str, Row] = {
    "distill": {},
    "shuffled": {"control": "shuffled"},
    "sampled": SAMPLED_TOKENS,
    "no_teacher": {**SAMPLED_TOKENS, "control": "no_teacher"},
}
LENGTHS = {"sft": 1, "sft_long": 4}  # of the outputs, in lengths of the samples of `distill`
ARMS = (*LOSSES, *LENGTHS)


def train(part: Part, arm: str, seed: int) -> tuple[Path, float]:
    """The folder of a run, and what it cost in FLOPs with the writing of what it read."""
    run, writing = folder(part, arm, seed), 0.0
    if arm in LENGTHS:
        budget = total_flops(folder(part, "distill", seed))
        settings, writing = prepare_outputs(part, run, LENGTHS[arm], seed, budget)
        fastkl("sft", HERE / "sft.yaml", run, {"seed": seed, **settings})
    else:
        fastkl("distill", part.yaml, run, {"seed": seed, **loss_settings(arm)})
    return run, writing + total_flops(run)


def loss_settings(arm: str) -> Row:
    return {f"loss.{name}": value for name, value in LOSSES[arm].items()}


def folder(part: Part, arm: str, seed: int) -> Path:
    return part.folder / f"{arm}-{seed}"
