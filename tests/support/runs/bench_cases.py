"""Short runs of the benches, and their small problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.lib.cases import Case, make_case


def bench_loss(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that `python -m bench loss` writes."""
    file = folder / "loss.json"
    main(["loss", "--shape", "12,8,70", "--repeats", "2", "--json", str(file), *arguments])
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def case_of(
    op: str = "policy_gradient",
    head: str = "trainable",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = (40, 16, 300),
    seed: int = 0,
) -> Case:
    return make_case(op, shape, dtype, head, "cpu", "peaked", entropy=1.0, seed=seed)


def bench_refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a bench says before it stops with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err
