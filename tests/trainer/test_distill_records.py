"""What a distillation leaves behind: metrics, samples, evaluations, saved students, and what reaches its trackers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from distill_cases import WORDS, Pair, counted, make_pair, run
from launches import run_python
from run_cases import fresh_accelerate
from tiny_data import sums
from transformers import AutoTokenizer

from fastkl.trainer.data.prompts import batch_indices
from fastkl.trainer.data.samples import UNKNOWN, Completion
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler


@pytest.fixture(autouse=True)
def fresh() -> None:
    fresh_accelerate()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


METRICS = {
    *("step", "teacher_kl", "entropy", "loss", "tokens_per_second", "optim/lr", "optim/grad_norm", "optim/skipped"),
    *("completions/mean_length", "completions/truncated_fraction"),
    *(f"policy/{name}" for name in ("ratio_mean", "ratio_min", "ratio_max", "clip_fraction", "k1", "k3")),
    *(f"sampler_mismatch/{name}" for name in ("mean_abs", "p95_abs", "outside_0.9_1.1")),
    *(f"flops/{name}" for name in ("sampling", "teacher", "student")),
    *(f"time/{name}" for name in ("sample", "teacher", "old_logprobs", "ranks", "train")),
}


def test_metrics_are_those_of_the_samples(tmp_path: Path, pair: Pair) -> None:
    done = run(tmp_path / "run", pair, optim__substeps=3, optim__steps=2, batch__max_tokens=40, loss__discount=0.5)
    for row in done.metrics:
        assert row.keys() == METRICS
        samples = [sample for sample in done.samples if sample["step"] == row["step"]]
        assert len(samples) == 6
        ours = [value for sample in samples for value in counted(sample, "sampler_logprobs")]
        theirs = [value for sample in samples for value in counted(sample, "teacher_logprobs")]
        assert row["teacher_kl"] == pytest.approx((sum(ours) - sum(theirs)) / len(ours), rel=1e-6)
        assert row["entropy"] == pytest.approx(-sum(ours) / len(ours), rel=1e-6)
        assert row["completions/mean_length"] == len(ours) / 6
        assert row["completions/truncated_fraction"] == sum(sample["truncated"] for sample in samples) / 6
        # The second and third optimizer step see a policy that has moved.
        assert row["policy/ratio_min"] < row["policy/ratio_mean"] < row["policy/ratio_max"]
        assert row["policy/ratio_min"] < 0.99
        assert row["sampler_mismatch/mean_abs"] < 1e-5


def test_samples_are_the_sampled_ids_and_never_tokenized_again(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's head is padded beyond the tokenizer: some of what it samples has no text that would give it back."""
    sampled: list[tuple[list[int], Completion]] = []
    sample = GenerateSampler.sample

    def recorded(self: GenerateSampler, prompts: list[list[int]], **options: Any) -> list[Completion]:
        completions = sample(self, prompts, **options)
        sampled.extend(zip(prompts, completions, strict=True))
        return completions

    monkeypatch.setattr(GenerateSampler, "sample", recorded)
    done = run(tmp_path / "run", pair, sampling__samples_per_prompt=3)
    words = AutoTokenizer.from_pretrained(pair.student)
    beyond = 0
    for record, (prompt, completion) in zip(done.samples, sampled, strict=True):
        row = sums()[record["prompt_index"]]
        assert prompt == words(f"<u>{row['prompt']}<a>")["input_ids"]
        assert record["ids"] == prompt + completion.token_ids
        assert record["loss_mask"] == [False] * len(prompt) + [True] * len(completion.token_ids)
        assert record["sampler_logprobs"] == [0.0] * len(prompt) + completion.logprobs
        assert record["tokens"] == [words.decode([token]) for token in record["ids"]]
        assert record["truncated"] == completion.truncated
        for token, score in zip(completion.token_ids, counted(record, "teacher_logprobs"), strict=True):
            assert (score == UNKNOWN) == (token >= WORDS + 3)  # ids that the teacher's head does not have
        beyond += max(record["ids"]) >= WORDS
    assert beyond > 0
    order = [index for step in range(3) for index in batch_indices(12, 6, step, 0)]
    assert [record["prompt_index"] for record in done.samples] == [index for index in order for _ in range(3)]


def test_log_samples_keeps_so_many_of_a_step(tmp_path: Path, pair: Pair) -> None:
    assert [s["step"] for s in run(tmp_path / "run", pair, log_samples=2).samples] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]), ("cosine", [0.5, 1, 1, 0.75, 0.25])],
)
def test_learning_rate(tmp_path: Path, pair: Pair, schedule: str, wanted: list[float]) -> None:
    done = run(tmp_path / "run", pair, optim__steps=5, optim__warmup_steps=2, optim__schedule=schedule, optim__lr=0.01)
    assert [row["optim/lr"] for row in done.metrics] == pytest.approx([0.01 * factor for factor in wanted])


def test_evaluation_before_during_and_after(tmp_path: Path, pair: Pair) -> None:
    done = run(
        tmp_path / "run", pair, optim__steps=5, eval__every=2, eval__data__path=pair.data, eval__max_new_tokens=4
    )
    assert [row["step"] for row in done.metrics] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in done.metrics if "eval/accuracy" in row] == [0, 2, 4, 5]
    assert done.metrics[0].keys() == {"step", "eval/accuracy", "eval/mean_length", "eval/truncated_fraction"}


def test_saved_students_load_without_fastkl(tmp_path: Path, pair: Pair) -> None:
    """The whole student and a merged adapter, as plain Transformers folders; the adapter alone through peft."""
    run(tmp_path / "full", pair, optim__lr=0.03)
    run(tmp_path / "lora", pair, optim__lr=0.03, student__lora__rank=2)
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
    done = run_python(code, pair.student, tmp_path / "full" / "student", tmp_path / "lora" / "student")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int | None, dict[str, Any]]]]:
    """What reaches a tracker that passes for TensorBoard."""
    logged: list[tuple[int | None, dict[str, Any]]] = []

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
            logged.append((step, values))

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr("accelerate.accelerator.LOGGER_TYPE_TO_CLASS", accelerate.tracking.LOGGER_TYPE_TO_CLASS)
    return logged  # type: ignore[return-value]


def test_trackers_get_the_metrics(tmp_path: Path, pair: Pair, tracked: list[tuple[int | None, dict[str, Any]]]) -> None:
    done = run(tmp_path / "run", pair, trackers='["tensorboard"]')
    assert [{"step": step, **values} for step, values in tracked] == done.metrics


def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    with pytest.raises(ConfigError, match=r"trackers has 'wandb'.*installed here: tensorboard"):
        run(tmp_path / "run", pair, trackers='["tensorboard", "wandb"]')
    assert not (tmp_path / "run").exists()
