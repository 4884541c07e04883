"""What a run leaves behind: records, evaluations, saved students, and what reaches its trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from launches import run_python
from run_cases import run
from run_settings import evaluated

from fastkl.trainer.errors import ConfigError


def test_log_samples_keeps_so_many_of_a_step(tmp_path: Path, padded: Path) -> None:
    assert [s["step"] for s in run(tmp_path / "run", padded, log_samples=2).samples] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]), ("cosine", [0.5, 1, 1, 0.75, 0.25])],
)
def test_learning_rate(tmp_path: Path, padded: Path, schedule: str, wanted: list[float]) -> None:
    done = run(
        tmp_path / "run", padded, optim__steps=5, optim__warmup_steps=2, optim__schedule=schedule, optim__lr=0.01
    )
    assert [row["optim/lr"] for row in done.metrics] == pytest.approx([0.01 * factor for factor in wanted])


def test_evaluation_before_during_and_after(tmp_path: Path, padded: Path) -> None:
    done = run(tmp_path / "run", padded, optim__steps=5, **evaluated(padded, eval__every=2))
    assert [row["step"] for row in done.metrics] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in done.metrics if "eval/accuracy" in row] == [0, 2, 4, 5]
    names = ("accuracy", "accuracy_se", "mean_length", "truncated_fraction", "flops")
    assert done.metrics[0].keys() == {"step", *(f"eval/{name}" for name in names)}


def test_saved_students_load_without_fastkl(tmp_path: Path, padded: Path) -> None:
    """The whole student and a merged adapter, as plain Transformers folders; the adapter alone through peft."""
    run(tmp_path / "full", padded, optim__lr=0.03)
    run(tmp_path / "lora", padded, optim__lr=0.03, student__lora__rank=2)
    code = """
import json, sys
sys.modules["fastkl"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, full, lora = sys.argv[1:]
def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits
def load(folder):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model
start, trained, merged = (logits(load(folder)) for folder in (base, full, lora))
adapter = logits(PeftModel.from_pretrained(load(base), lora + "/adapter"))
assert not torch.allclose(start, trained) and not torch.allclose(start, merged)
torch.testing.assert_close(merged, adapter, atol=1e-4, rtol=1e-4)
for folder in (full, lora):
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert json.load(open(folder + "/config.json"))["architectures"] == ["LlamaForCausalLM"]
"""
    done = run_python(code, padded / "student", tmp_path / "full" / "student", tmp_path / "lora" / "student")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows that reach a tracker that passes for TensorBoard."""
    logged: list[dict[str, Any]] = []

    class Recorder(accelerate.tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = False
        tracker = None
        main_process_only = True

        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

        def start(self) -> None: ...
        def store_init_configuration(self, values: dict[str, Any]) -> None: ...
        def finish(self) -> None: ...

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            logged.append({"step": step, **values})

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr("accelerate.accelerator.LOGGER_TYPE_TO_CLASS", accelerate.tracking.LOGGER_TYPE_TO_CLASS)
    return logged


def test_trackers_get_the_metrics(tmp_path: Path, padded: Path, tracked: list[dict[str, Any]]) -> None:
    assert run(tmp_path / "run", padded, trackers='["tensorboard"]').metrics == tracked


def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, padded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    with pytest.raises(ConfigError, match=r"trackers has 'wandb'.*installed here: tensorboard"):
        run(tmp_path / "run", padded, trackers='["tensorboard", "wandb"]')
    assert not (tmp_path / "run").exists()
