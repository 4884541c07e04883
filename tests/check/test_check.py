"""`python -m fastkl.check`: what it prints and writes, and that it fails when a kernel is wrong, by its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastkl import check
from fastkl._check import machine, problem, times
from fastkl._check.errors import Check, Measured, of_entries, of_rows, of_tensor, of_values
from fastkl._extras import install_command
from fastkl.kernels import driver
from fastkl.kernels.divergence import pytorch as divergence
from fastkl.kernels.divergence.formula import DIVERGENCES
from fastkl.kernels.rows import pytorch as rows
from fastkl.kernels.rows.cross_entropy import pytorch as cross_entropy
from fastkl.kernels.score import cpu as score
from fastkl.kernels.sparse import pytorch as sparse

KERNELS = {
    *("rows.token_nll", "rows.clear_rows", "rows.token_nll_entropy", "rows.entropy_gradient"),
    *("cross_entropy.cross_entropy", "top_k.tail_sums", "top_k.tail_gradient", "score.token_nll"),
    *(f"divergence.{name}" for name in DIVERGENCES),
    *("sparse.sample", "sparse.hidden_gradient", "sparse.weight_gradient"),
}
TOP_K_LOSSES = ("loss: top-k KL", "loss: top-k KL, sampled tail")
SMALL = problem.Sizes(10, 16, 4112)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (problem, times):
        monkeypatch.setitem(module.SIZES, "cpu", SMALL)


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "dtypes", lambda _: [torch.float32])


def test_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "check.json"
    assert check.main(["--device", "cpu", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["complete"]
    assert {one["variant"] for one in found["checks"]} == {"fp32", "bf16", "fp16"}
    names = {one["kernel"] for one in found["checks"]}
    assert {name for name in names if not name.startswith("loss: ")} == KERNELS
    assert all(one["ok"] and 0 <= one["error"] <= one["bound"] for one in found["checks"])
    assert {one["loss"] for one in found["times"]} == {*times.calls()}
    assert all(units > 0 for one in found["times"] for units in one["units"].values())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"fastkl 0.1.0 · python {found['versions']['python']} · torch {torch.__version__}")
    assert printed[1].startswith("device   cpu: ")
    assert printed[2] == "backend  torch: the Triton kernels need a GPU"
    assert printed[-1].endswith(": all within their bounds")
    assert max(map(len, printed)) <= 100


Wrong = Callable[[pytest.MonkeyPatch], object]


def broken(module: ModuleType | type, name: str, where: int, scale: float = 1.01) -> Wrong:
    """Makes the argument at a place, a result that a function writes, wrong by a hundredth."""

    def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(module, name)

        def function(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            (result if where < 0 else arguments[where]).mul_(scale)
            return result

        monkeypatch.setattr(module, name, function)

    return wrong


def broken_divergence(name: str) -> Wrong:
    def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
        original = divergence.divergence

        def function(
            kind: str, parameter: float, logits: Any, tokens: Any, out: Any, gradient: Any, **options: Any
        ) -> Any:
            factor = original(kind, parameter, logits, tokens, out, gradient, **options)  # type: ignore[arg-type]
            if kind == name:
                gradient[:, 4000:].mul_(1.01)  # in the tail alone, where a norm would not see it
            return factor

        monkeypatch.setattr(divergence, "divergence", function)

    return wrong


BROKEN: dict[str, Wrong] = {
    "rows.token_nll": broken(rows, "token_nll", 2),
    "rows.clear_rows": lambda patch: patch.setattr(rows, "clear_rows", lambda *_: None),
    "rows.token_nll_entropy": broken(rows, "token_nll_entropy", 2),
    "rows.entropy_gradient": broken(rows, "entropy_gradient", 4),
    "cross_entropy.cross_entropy": broken(cross_entropy, "cross_entropy", 4),
    "top_k.tail_sums": broken(rows, "tail_sums", 1),
    "top_k.tail_gradient": broken(rows, "tail_gradient", 3),
    "score.token_nll": broken(score, "token_nll", 2),
    "sparse.sample": broken(sparse.PyTorchColumnSampler, "estimate", -1),
    "sparse.hidden_gradient": broken(sparse._SparseSample, "hidden_gradient", -1),
    "sparse.weight_gradient": broken(sparse._SparseSample, "add_to_weight_gradient", 1),
    "loss: policy gradient": broken(driver, "hidden_gradient", -1),
    **{f"divergence.{name}": broken_divergence(name) for name in DIVERGENCES},
}


@pytest.mark.parametrize(("kernel", "wrong"), BROKEN.items(), ids=BROKEN)
def test_a_wrong_kernel_is_named(
    kernel: str, wrong: Wrong, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    in_float32(monkeypatch)
    wrong(monkeypatch)
    file = tmp_path / "check.json"
    assert check.main(["--device", "cpu", "--json", str(file)]) == 1
    printed = capsys.readouterr().out
    assert f"\nFAILED  {kernel}, fp32, " in printed
    assert "error " in printed
    assert ", bound " in printed
    failed = {one["kernel"] for one in json.loads(file.read_text())["checks"] if not one["ok"]}
    others = {name for name in failed if not name.startswith("loss: ")} - {kernel}
    assert not others or kernel in ("top_k.tail_sums", "sparse.sample", "rows.token_nll_entropy")


def test_every_kernel_was_broken() -> None:
    assert {name for name in BROKEN if not name.startswith("loss")} == KERNELS


def test_what_raises_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    in_float32(monkeypatch)

    def no_image(*_: object) -> None:
        raise RuntimeError("\nno kernel image is available\nmore")

    monkeypatch.setattr(rows, "tail_sums", no_image)
    file = tmp_path / "check.json"
    assert check.main(["--device", "cpu", "--json", str(file)]) == 1
    reason = "RuntimeError: no kernel image is available"
    assert f"FAILED  top_k.tail_sums, fp32, launch: {reason}\n" in capsys.readouterr().out
    found = [one for one in json.loads(file.read_text())["checks"] if not one["ok"]]
    assert {one["kernel"] for one in found} == {"top_k.tail_sums", "top_k.tail_gradient", *TOP_K_LOSSES}
    assert {one["error"] for one in found} == {None}


def test_what_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    in_float32(monkeypatch)
    broken(rows, "token_nll", 2, scale=float("nan"))(monkeypatch)
    assert check.main(["--device", "cpu"]) == 1
    assert "FAILED  rows.token_nll, fp32, values: error not finite, bound 1.0e-05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (
            ["--json", "/no/such/folder/x.json"],
            "argument --json: the folder /no/such/folder does not exist; create it first",
        ),
        (["--json", "/dev/null"], "argument --json: /dev/null is no file; name one that may be replaced"),
        (["--json", ""], "argument --json: . is no file"),
        (["--json", "/proc/x.json"], "argument --json: /proc takes no files ("),
        (["--fast"], "unrecognized arguments: --fast"),
        pytest.param(
            ["--device", "cuda"],
            "argument --device: torch sees no CUDA or HIP device here; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        check.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_version", lambda package: None)
    assert machine.missing("torch") == [
        f"the trainer needs transformers, accelerate, peft: {install_command('trainer')} (the losses do not)"
    ]
    monkeypatch.setattr(machine, "_version", lambda package: "1")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert machine.missing("triton") == ["Triton needs a C compiler: install gcc or clang, or set CC"]
    monkeypatch.setitem(sys.modules, "fastkl.kernels.launch", None)
    (line,) = machine.missing("triton")
    assert line.startswith("the losses need triton >= 3.6 here, and it cannot be imported (")


def test_errors() -> None:
    exact = torch.tensor([[1.0, 2e-4, 0.0]], dtype=torch.float64)
    found = exact.float() + torch.tensor([[0.0, 1e-4, 0.0]])
    assert of_entries(found, exact, 0.0, torch.float32) == pytest.approx(0.5, rel=1e-3)
    assert of_entries(found, exact, 2e-4, torch.float32) == pytest.approx(0.25, rel=1e-3)
    assert of_rows(found, exact) == of_tensor(found, exact) == pytest.approx(1e-4, rel=1e-3)
    assert of_values(found, exact) == pytest.approx(1e-4, rel=1e-2)
    assert of_values(found * torch.nan, exact) == float("inf")
    assert of_rows(torch.ones(1, 2), torch.zeros(1, 2).double()) > 1e30
    assert not Measured("a.b", "values", float("nan"), 1.0).ok


def test_a_line_is_of_one_kernel_and_all_dtypes() -> None:
    def measured(*kernels: str) -> Check:
        return Check(kernels, "", lambda: None, lambda _: [Measured(name, "values", 0.0, 1.0) for name in kernels])

    found = dict(check.by_kernel({"fp32": [measured("a", "b")], "bf16": [measured("a", "b"), measured("c")]}))
    assert {name: {dtype: len(cell) for dtype, cell in cells.items()} for name, cells in found.items()} == {
        "a": {"fp32": 1, "bf16": 1},
        "b": {"fp32": 1, "bf16": 1},
        "c": {"fp32": 0, "bf16": 1},
    }
