"""Runs: made, read back, compared without their times, ended too early or refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from run_settings import MINIMAL, Settings, arguments, config, distillation
from safetensors.torch import load_file
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import save_model, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.distill import OnPolicy, distill
from fastkl.trainer.sft import Examples, sft

PEERS = {"ddp": False, "fsdp": True}
WORDS = len(tokenizer())


def padded_pair(folder: Path) -> Path:
    """Student and teacher whose heads are padded to different sizes, as they are in real families, and sums."""
    save_model(folder / "student", vocabulary=WORDS + 8)
    save_model(folder / "teacher", vocabulary=WORDS + 3, seed=1, width=24, tie_word_embeddings=False)
    write_jsonl(folder / "sums.jsonl", sums())
    return folder


def fresh_accelerate() -> None:
    """accelerate keeps one mixed precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def distilled(settings: dict[str, object]) -> Path:
    fresh_accelerate()
    return distill(config("distill", settings)).path


def tuned(settings: dict[str, object]) -> Path:
    """As `fastkl sft` does it."""
    fresh_accelerate()
    return sft(config("sft", settings)).path


class Run(NamedTuple):
    folder: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Run:
        return cls(folder, read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "samples.jsonl"))

    def weights(self) -> dict[str, Tensor]:
        return weights(self.folder / "student")


def run(path: Path, folder: Path, **overrides: object) -> Run:
    """A distillation with the folder's models."""
    return Run.of(distilled(distillation(path, folder, **overrides)))


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def fields(sample: Sample) -> dict[str, Any]:
    """The sample's fields by name, its arrays as lists."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(sample).items()}


def counted(sample: dict[str, Any], field: str) -> list[Any]:
    """What a sample has of a field at the tokens that count."""
    return list(itertools.compress(sample[field], sample["loss_mask"]))


def completion_logprobs(model: Any, sample: dict[str, Any], temperature: float = 1.0, ids: int | None = None) -> Tensor:
    """[n, V] over the first so many ids, at the tokens that count; an id that the model does not know is read as 0."""
    read = torch.tensor([sample["ids"]])
    logits = model(read.where(read < model.config.vocab_size, 0)).logits[0, :-1, :ids]
    return torch.log_softmax(logits / temperature, -1)[torch.tensor(sample["loss_mask"][1:])]


def token_logprobs(model: Any, sample: dict[str, Any]) -> Tensor:
    """[n], of the tokens that count."""
    return completion_logprobs(model, sample).gather(1, torch.tensor(counted(sample, "ids"))[:, None])[:, 0]


def check_moments(path: Path, model: Any) -> None:
    """After one update from the model's gradients, Adam's means are 1 − β₁ = 0.1 of them."""
    for (name, parameter), found in zip(as_optimized(model), first_moments(path), strict=True):
        error, scale = (found - 0.1 * parameter.grad).abs().max(), 0.1 * parameter.grad.abs().max()
        assert error <= 2e-3 * scale, f"{name}: off by {error} at a scale of {scale}"


def refusal(said: pytest.CaptureFixture[str], command: str, settings: dict[str, object], *parts: str) -> str:
    """What a command that ends with status 2 says; each part is in it."""
    assert cli.main(arguments(command, settings)) == 2
    error = said.readouterr().err
    assert [part for part in parts if part not in error] == [], error
    return error


def refusals(command: str, cases: Iterable[tuple[Settings, list[str]]]) -> list[Any]:
    """Parameters of `check_refused`, of a command's settings and what is said of them."""
    return [
        pytest.param(command, settings, parts, id="-".join([command, *map("{0[0]}={0[1]}".format, settings.items())]))
        for settings, parts in cases
    ]


def check_refused(
    said: pytest.CaptureFixture[str], folder: Path, command: str, settings: Settings, *parts: str
) -> None:
    """In one line, with nothing left behind in a folder; the settings come on top of the least that is needed."""
    error = refusal(said, command, MINIMAL[command] | settings, *parts)
    assert error.startswith("fastkl: ")
    assert error.count("\n") == 1
    assert list(folder.iterdir()) == []


def check_scores(folder: Path, data: Path, here: Settings, there: Settings, tolerance: float) -> None:
    """`fastkl score` of the same rows by two models."""
    files = folder / "here.jsonl", folder / "there.jsonl"
    for model, file in zip((here, there), files, strict=True):
        assert cli.main(arguments("score", {"data.path": data, **model, "output": file})) == 0
    for a, b in zip(*map(read_jsonl, files), strict=True):
        assert (a["source"], a["ids"], a["loss_mask"]) == (b["source"], b["ids"], b["loss_mask"])
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=tolerance)


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"}


def log(run: Path) -> list[dict[str, Any]]:
    return [untimed(row) for row in read_jsonl(run / "metrics.jsonl")]


def as_optimized(model: Any) -> list[tuple[str, Tensor]]:
    """The parameters in the optimizer's order: matrices decay, vectors do not."""
    return sorted(model.named_parameters(), key=lambda named: named[1].dim() < 2)


def first_moments(run: Path) -> list[Tensor]:
    """Adam's running mean of the gradients, of every trained parameter: what the updates were made of."""
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = torch.load(checkpoint / "optimizer.bin", weights_only=False)["state"]
    return [state[index]["exp_avg"] for index in sorted(state)]


def check_equal(run: Path, whole: Path) -> None:
    """Exactly: the same bits in the same order, but for the times."""
    assert log(run) == log(whole)
    assert (run / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    check_same_weights(run, whole)


def check_same_weights(run: Path, whole: Path) -> None:
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def interrupt(monkeypatch: pytest.MonkeyPatch, run: Settings, step: int, command: str = "distill") -> None:
    """Ctrl-C in a step, counted from 0."""
    source: Any = {"distill": OnPolicy, "sft": Examples}[command]
    samples = source.samples

    def interrupted(self: Any, at: int, *args: Any) -> Any:
        if at == step:
            raise KeyboardInterrupt
        return samples(self, at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(source, "samples", interrupted)
        assert cli.main(arguments(command, run)) == 130


def check_same(found: Path, wanted: Path, tolerance: float = 2e-4) -> None:
    """To float tolerance: sums are taken in another order."""
    for ours, theirs in zip(log(found), log(wanted), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-5)
    ours, theirs = read_jsonl(found / "samples.jsonl"), read_jsonl(wanted / "samples.jsonl")
    assert [row["ids"] for row in ours] == [row["ids"] for row in theirs]
    # Ranks while the weights are the same: later, neighbours may change places.
    for name in ("student_ranks", "teacher_ranks"):
        assert [row[name] for row in ours if row["step"] == 1] == [row[name] for row in theirs if row["step"] == 1]
        assert any(any(row[name]) for row in ours if row["step"] == 1)
    for name in [path.relative_to(wanted) for path in wanted.glob("student/**/*.safetensors")]:
        weights, same = load_file(found / name), load_file(wanted / name)
        assert weights.keys() == same.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(
                weight, same[key], atol=tolerance, rtol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
            )
