"""Several processes: the losses, weights and files of one, whoever shards the model and whoever wrote the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import arguments, distillation, give_samples, read_jsonl, save_model, sums, together, write_jsonl

from fastkl.trainer.distill import OnPolicy

PEERS = {"ddp": False, "fsdp": True}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    save_model(path / "student", layers=2)
    save_model(path / "untied", tie_word_embeddings=False)
    save_model(path / "teacher", seed=1)
    write_jsonl(path / "sums.jsonl", sums())
    return path


def settings(folder: Path, run: Path, **overrides: object) -> list[str]:
    options: dict[str, object] = {
        "batch__max_tokens": 40,
        "optim__steps": 3,
        "optim__substeps": 2,
        "sampling__prompts_per_step": 7,
        "eval__data__path": folder / "sums.jsonl",
        "eval__max_new_tokens": 4,
        "eval__every": 1,
        **overrides,
    }
    student = folder / str(options.pop("student", "student"))
    return arguments("distill", distillation(run, student, folder / "teacher", folder / "sums.jsonl", **options))


def run(command_line: list[str], errors: Path, count: int, fsdp: bool = False) -> Path:
    """With given samples, so that they are the same for any number of processes."""
    codes, said = together(
        command_line, errors, count=count, fsdp=fsdp, before=dict.fromkeys(range(count), give_samples)
    )
    assert codes == [0] * count, "\n".join(said)
    return Path(next(word.removeprefix("--run=") for word in command_line if word.startswith("--run=")))


def log(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows]


def check_same(found: Path, wanted: Path, tolerance: float = 2e-4) -> None:
    """To float tolerance: sums are taken in another order."""
    for ours, theirs in zip(log(found), log(wanted), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-5)
    ours, theirs = read_jsonl(found / "samples.jsonl"), read_jsonl(wanted / "samples.jsonl")
    assert [row["ids"] for row in ours] == [row["ids"] for row in theirs]
    for name in [path.relative_to(wanted) for path in wanted.glob("student/**/*.safetensors")]:
        weights, same = load_file(found / name), load_file(wanted / name)
        assert weights.keys() == same.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(
                weight, same[key], atol=tolerance, rtol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
            )


VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    "lora": {"student__lora__rank": 2, "loss__old_logprobs": "recompute"},
    "untied": {"student": "untied", "loss__old_logprobs": "recompute", "student__gradient_checkpointing": "true"},
    "packed": {"batch__layout": "packed", "loss__method": "ppo", "optim__substeps": 3},
}


@pytest.mark.parametrize(
    ("variant", "fsdp"),
    [
        pytest.param(variant, fsdp, id=f"{variant}-{name}", marks=() if variant == "full" else slow)
        for variant in VARIANTS
        for name, fsdp in PEERS.items()
    ],
)
def test_two_processes_do_what_one_does(tmp_path: Path, folder: Path, variant: str, fsdp: bool) -> None:
    options = VARIANTS[variant]
    one = run(settings(folder, tmp_path / "one", **options), tmp_path / "said", 1)
    two = run(settings(folder, tmp_path / "two", **options), tmp_path / "said", 2, fsdp)
    assert len(log(one)) == 4
    check_same(two, one)


RESHAPES = {
    "fsdp-2-to-1": ((2, True), (1, False)),
    "ddp-2-to-1": ((2, False), (1, False)),
    "1-to-ddp-2": ((1, False), (2, False)),
    "1-to-fsdp-2": ((1, False), (2, True)),
    "ddp-2-to-fsdp-2": ((2, False), (2, True)),
    "fsdp-2-to-2": ((2, True), (2, True)),
}
FAST = ("fsdp-2-to-1", 0)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        pytest.param(name, lora, id=f"{name}{'-lora' * (lora > 0)}", marks=() if (name, lora) == FAST else slow)
        for name in RESHAPES
        for lora in (0, 2)
    ],
)
def test_a_checkpoint_knows_nothing_of_processes(tmp_path: Path, folder: Path, name: str, lora: int) -> None:
    """Saved by some and resumed by others, the run is the one that was never interrupted."""
    (before, first), (after, then) = RESHAPES[name]
    options: dict[str, object] = {"student__lora__rank": lora, "optim__steps": 4, "checkpoint__every": 2}
    whole = run(settings(folder, tmp_path / "whole", **options), tmp_path / "said", 1)
    command_line = settings(folder, tmp_path / "run", **options)
    codes, _ = together(
        command_line, tmp_path / "said", count=before, fsdp=first, before=dict.fromkeys(range(before), stop_at_step_3)
    )
    assert codes == [130] * before
    check_same(run(command_line, tmp_path / "said", after, then), whole)


def stop_at_step_3() -> None:
    give_samples()
    samples = OnPolicy.samples

    def interrupted(self: OnPolicy, step: int, *args: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return samples(self, step, *args)

    OnPolicy.samples = interrupted  # type: ignore[method-assign]
