"""Where weights are written for a sampling server: in memory, if it is here and there is room."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_cases import distilled
from run_settings import distillation
from server_cases import served
from stub_server import serving
from stub_vllm import StubVllm
from tiny_models import llama

from fastkl.trainer.config.models import LoraConfig
from fastkl.trainer.models.adapters import adapted
from fastkl.trainer.models.saving import save_weights
from fastkl.trainer.models.text_path import text_path
from fastkl.trainer.rollouts.samplers import weights_folder as where

LORA: dict[str, object] = {"student.lora.rank": 4}
HERE = "http://127.0.0.1:8000/v1"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "memory"
    path.mkdir()
    monkeypatch.setattr(where, "MEMORY", path)
    return path


@pytest.mark.parametrize("url", [HERE, "http://localhost:1/v1", "https://[::1]:8000"])
def test_a_server_of_this_machine_reads_memory(
    url: str, tmp_path: Path, memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = where.weights_folder(url, tmp_path / "run", 1e3)
    assert found.parent == memory
    assert found != where.weights_folder(url, tmp_path / "other", 1e3)
    assert f"through {found}, which is memory" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000/v1", "http://name.invalid/v1"])
def test_another_machine_reads_the_run_folder(
    url: str, tmp_path: Path, memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert where.weights_folder(url, tmp_path / "run", 1e3) == tmp_path / "run" / "weights"
    assert "is another machine's. sampling.server.weights names" in capsys.readouterr().err


def test_so_does_a_server_where_memory_is_short(
    tmp_path: Path, memory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert where.weights_folder(HERE, tmp_path / "run", 1e15) == tmp_path / "run" / "weights"
    assert "3 copies of 1000000.0 GB have no room in" in capsys.readouterr().err
    monkeypatch.setattr(where, "MEMORY", tmp_path / "none")
    assert where.weights_folder(HERE, tmp_path / "run", 1.0) == tmp_path / "run" / "weights"


def test_nothing_is_left_of_a_run_nor_of_one_that_was_killed(tmp_path: Path, memory: Path) -> None:
    own, other = (where.weights_folder(HERE, tmp_path / name, 1e3) for name in ("run", "other"))
    for folder in (own, other):
        (folder / "weights").mkdir(parents=True)
    with where.memory_emptied(tmp_path / "run"):
        assert not own.exists()
        own.mkdir()
    assert list(memory.iterdir()) == [other]


@pytest.mark.parametrize("kind", [{}, LORA], ids=["full", "lora"])
def test_a_run_pushes_through_memory(
    kind: dict[str, object], tmp_path: Path, folder: Path, memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(folder / "student", kind=StubVllm) as stub:
        distilled(distillation(tmp_path / "run", folder, optim__steps=1, **served("sampling", stub)) | kind)
        assert [path.parent.parent for path in stub.loads] == [memory]
    assert list(memory.iterdir()) == []
    assert not (tmp_path / "run" / "weights").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_size_is_that_of_the_files(tied: bool, rank: int, tmp_path: Path) -> None:
    model = llama(400, tie_word_embeddings=tied)
    model = adapted(model, LoraConfig(rank=rank), text_path(model, 64)) if rank else model
    save_weights(model, tmp_path)
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert files * 0.7 <= where.weights_size(model) <= files * 1.7
