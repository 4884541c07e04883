"""Rollouts by a vLLM server for a run of several processes: the first of them samples, all learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from launches import together
from run_cases import PEERS, check_same, log
from run_settings import arguments, distillation, evaluated
from server_cases import served
from stub_server import serving
from stub_vllm import StubVllm

slow = pytest.mark.slow
STEPS = 3


@pytest.fixture
def stub(folder: Path) -> Iterator[StubVllm]:
    with serving(folder / "student", kind=StubVllm) as server:
        yield server


def command(folder: Path, run: Path, stub: StubVllm, **overrides: object) -> list[str]:
    small = {"optim__steps": STEPS, **evaluated(folder, eval__every=1), **overrides}
    server = served("sampling", stub, retries=0, concurrency=1)
    return arguments("distill", distillation(run, folder, **small, **server))


@pytest.fixture(scope="module")
def learned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(fsdp, lora) -> the run of two processes that nothing went wrong in, made once."""

    @cache
    def run(fsdp: bool, lora: int = 0) -> Path:
        path = tmp_path_factory.mktemp("learned")
        learn(folder, path, 2, fsdp, lora)
        return path / "run"

    return run


def learn(folder: Path, path: Path, count: int, fsdp: bool, lora: int) -> None:
    with serving(folder / "student", kind=StubVllm) as stub:
        line = command(folder, path / "run", stub, student__lora__rank=lora)
        codes, said = together(line, path / "said", count=count, fsdp=fsdp)
    assert codes == [0] * count, "\n".join(said)
    assert len(stub.loads) == STEPS + 1  # one push for each change of the weights


@pytest.mark.parametrize(
    ("fsdp", "lora"),
    [
        pytest.param(fsdp, lora, id=f"{name}{'-lora' * (lora > 0)}", marks=slow if fsdp and lora else ())
        for name, fsdp in PEERS.items()
        for lora in (0, 4)
    ],
)
def test_samples_losses_and_pushes_are_those_of_one_process(
    tmp_path: Path, folder: Path, learned: Callable[..., Path], fsdp: bool, lora: int
) -> None:
    learn(folder, tmp_path, 1, False, lora)
    check_same(learned(fsdp, lora), tmp_path / "run")
    assert all(row["sampler_mismatch/mean_abs"] < 1e-5 for row in log(learned(fsdp, lora))[1:])


@pytest.mark.parametrize("fsdp", PEERS.values(), ids=PEERS)
def test_a_server_that_starts_again_gets_the_weights_again(
    tmp_path: Path, folder: Path, stub: StubVllm, learned: Callable[..., Path], fsdp: bool
) -> None:
    stub.restart_at = 40  # in a rollout
    line = [*command(folder, tmp_path / "run", stub), "--sampling.server.retries=1"]
    codes, said = together(line, tmp_path / "said", fsdp=fsdp)
    assert codes == [0, 0], "\n".join(said)
    assert len(stub.loads) == STEPS + 2
    check_same(tmp_path / "run", learned(fsdp), tolerance=1e-6)


def test_a_server_that_is_gone_ends_both_with_a_checkpoint(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    options: dict[str, object] = {"eval__every": 0, "checkpoint__every": 0}
    codes, _ = together(command(folder, tmp_path / "whole", stub, **options), tmp_path / "said")
    assert codes == [0, 0]
    stub.restart()
    stub.down_after = 30  # in a rollout
    line = command(folder, tmp_path / "run", stub, **options)
    codes, said = together(line, tmp_path / "said")
    assert codes == [2, 2]
    assert "".join(said).count("fastkl: the sampling server") == 1
    stub.down_after = None
    stub.restart()
    codes, said = together(line, tmp_path / "said")
    assert codes == [0, 0], "\n".join(said)
    assert "resumed" in said[0]
    check_same(tmp_path / "run", tmp_path / "whole", tolerance=1e-6)


def test_an_unfit_server_is_refused_once(tmp_path: Path, folder: Path, stub: StubVllm) -> None:
    stub.development = False
    codes, said = together(command(folder, tmp_path / "run", stub), tmp_path / "said")
    assert codes == [2, 2]
    assert "".join(said).count("takes no new weights while it runs") == 1
    assert not (tmp_path / "run").exists()
