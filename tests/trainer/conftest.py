"""Models and fixtures that the trainer's tests share. A test writes nothing into the models' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_cases import fresh_accelerate, padded_pair
from tiny_data import model_and_sums, pair_and_sums
from tiny_models import save_model

from fastkl.trainer.distill import OnPolicy
from fastkl.trainer.rollouts.samplers import weights_folder


@pytest.fixture(autouse=True)
def fresh() -> None:
    fresh_accelerate()


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to /dev/shm: weights for a server are in the run folder."""
    monkeypatch.setattr(weights_folder, "MEMORY", Path("/nonexistent"))


@pytest.fixture
def steps_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of distillations that are taken from here on."""
    taken: list[int] = []
    samples = OnPolicy.samples

    def recorded(self: OnPolicy, step: int, *args: Any) -> Any:
        taken.append(step)
        return samples(self, step, *args)

    monkeypatch.setattr(OnPolicy, "samples", recorded)
    return taken


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the test is; what it writes by a relative path is there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher and a dozen sums."""
    return pair_and_sums(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a wider teacher, a reference and a dozen sums; heads of one size."""
    path = model_and_sums(tmp_path_factory.mktemp("models"), "student")
    save_model(path / "teacher", seed=1, width=24, tie_word_embeddings=False)
    save_model(path / "reference", seed=2)
    return path


@pytest.fixture(scope="session")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher and sums; heads padded to different sizes."""
    return padded_pair(tmp_path_factory.mktemp("padded"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose head is not its embedding."""
    return save_model(tmp_path_factory.mktemp("untied") / "teacher", seed=1, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention dropout makes an update depend on the random state too, which a checkpoint must therefore hold."""
    return pair_and_sums(tmp_path_factory.mktemp("dropout"), attention_dropout=0.2)
