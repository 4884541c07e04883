"""Models that the trainer's tests share. A test writes nothing into their folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_cases import fresh_accelerate, padded_pair
from tiny_data import pair_and_sums


@pytest.fixture(autouse=True)
def fresh() -> None:
    fresh_accelerate()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher and a dozen sums."""
    return pair_and_sums(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with heads padded to different sizes."""
    return padded_pair(tmp_path_factory.mktemp("padded"))


@pytest.fixture(scope="session")
def dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention dropout makes an update depend on the random state too, which a checkpoint must therefore hold."""
    return pair_and_sums(tmp_path_factory.mktemp("dropout"), attention_dropout=0.2)
