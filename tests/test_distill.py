"""On-policy distillation end to end, on models so small that every number can be computed once more by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import accelerate.tracking
import pytest
import torch
from accelerate.utils import LoggerType
from run_cases import first_moments, fresh_accelerate, untimed
from tiny import config, distillation, read_jsonl, run_python, save_model, sums, tokenizer, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkl import reference
from fastkl.trainer.config.errors import ConfigError
from fastkl.trainer.data.prompts import batch_indices
from fastkl.trainer.distill import distill
from fastkl.trainer.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.samplers.sampler import Completion
from fastkl.trainer.teachers.teacher import UNKNOWN

WORDS = len(tokenizer())


@pytest.fixture(autouse=True)
def fresh() -> None:
    fresh_accelerate()


class Pair(NamedTuple):
    student: Path
    teacher: Path
    data: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Heads padded to different sizes, as they are in real families; data with an answer per row."""
    folder = tmp_path_factory.mktemp("pair")
    return Pair(
        save_model(folder / "student", vocabulary=WORDS + 8),
        save_model(folder / "teacher", vocabulary=WORDS + 3, seed=1, width=24, tie_word_embeddings=False),
        write_jsonl(folder / "sums.jsonl", sums()),
    )


class Run(NamedTuple):
    folder: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def weights(self) -> dict[str, Tensor]:
        return weights(self.folder / "student")


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def run(folder: Path, pair: Pair, **overrides: object) -> Run:
    path = distill(config("distill", distillation(folder, *pair, **overrides))).path
    return Run(path, read_jsonl(path / "metrics.jsonl"), read_jsonl(path / "samples.jsonl"))


def mean_of_last(run: Run, name: str, count: int = 5) -> float:
    return sum(row[name] for row in run.metrics[-count:]) / count


def counted(sample: dict[str, Any], field: str) -> list[float]:
    return list(itertools.compress(sample[field], sample["loss_mask"]))


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_teacher_kl_falls(tmp_path: Path, pair: Pair, lora_rank: int) -> None:
    # Ties are undone by LoRA's layers: the student's own weights need to move more.
    done = run(
        tmp_path / "run",
        pair,
        student__lora__rank=lora_rank,
        sampling__prompts_per_step=12,
        optim__steps=40,
        optim__lr=0.03,
        optim__warmup_steps=2,
    )
    assert [row["step"] for row in done.metrics] == list(range(1, 41))
    assert mean_of_last(done, "teacher_kl") < 0.6 * sum(row["teacher_kl"] for row in done.metrics[:3]) / 3


def test_without_kl_and_with_equal_rewards_nothing_moves(tmp_path: Path, pair: Pair) -> None:
    equal = {"reward__grader": "regex:$", "sampling__samples_per_prompt": 2}
    done = run(tmp_path / "run", pair, loss__kl_coef=0, optim__lr=0.1, **equal)
    assert all(row["optim/grad_norm"] == 0 for row in done.metrics)
    before, after = weights(pair.student), done.weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(tmp_path: Path, pair: Pair) -> None:
    done = run(tmp_path / "run", pair._replace(teacher=pair.student), optim__steps=1)
    (row,) = done.metrics
    assert row["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert row["loss"] == pytest.approx(0, abs=1e-6)
    assert row["optim/grad_norm"] < 1e-5  # against about 1 with another teacher


# Every option of the update, against the same step written out with all the logits.
UPDATES: dict[str, dict[str, object]] = {
    "default": {},
    "substeps": {"optim__substeps": 3},
    "recompute": {"loss__old_logprobs": "recompute", "optim__substeps": 2},
    "current": {"loss__old_logprobs": "current", "optim__substeps": 2},
    "reinforce": {"loss__method": "reinforce", "optim__substeps": 2},
    "ppo": {"loss__method": "ppo", "optim__substeps": 3, "loss__clip_low": 0.01, "loss__clip_high": 0.02},
    "ppo-dual-clip": {"loss__method": "ppo", "optim__substeps": 3, "loss__dual_clip": 1.01},
    "cispo": {"loss__method": "cispo", "optim__substeps": 3, "loss__clip_low": 0.01, "loss__clip_high": 0.02},
    "truncated-ratio": {"loss__truncate_ratio": 1.01, "optim__substeps": 3},
    "kl-coef": {"loss__kl_coef": 0.3},
    "discount": {"loss__discount": 0.9},
    "temperature": {"sampling__temperature": 0.6, "optim__substeps": 2},
    "samples-per-prompt": {"sampling__samples_per_prompt": 3},
    "no-clipping": {"optim__max_grad_norm": "null"},
    "packed": {"batch__layout": "packed", "batch__max_tokens": 30},
    "checkpointing": {"student__gradient_checkpointing": "true"},
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_a_step_equals_the_same_step_by_hand(tmp_path: Path, pair: Pair, options: dict[str, object]) -> None:
    settings = config("distill", distillation(tmp_path, *pair, **options))
    done = run(tmp_path / "run", pair, optim__steps=1, **options)
    student = AutoModelForCausalLM.from_pretrained(pair.student)
    moments, loss, norm = by_hand(student, pair.teacher, done.samples, settings)
    assert done.metrics[0]["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert done.metrics[0]["optim/grad_norm"] == pytest.approx(norm, rel=1e-3)
    names = [name for name, _ in student.named_parameters()]
    for name, found, wanted in zip(names, first_moments(done.folder), moments, strict=True):
        error, scale = (found - wanted).abs().max(), wanted.abs().max()
        assert error <= 2e-3 * scale, f"{name}: off by {error} at a scale of {scale}"


def by_hand(
    student: Any, teacher: Path, samples: list[dict[str, Any]], settings: Any
) -> tuple[list[Tensor], float, float]:
    """One step with the models' own logits and torch's own AdamW: Adam's moments, loss, mean gradient norm."""
    loss_config, optim, temperature = settings.loss, settings.optim, settings.sampling.temperature

    def logprobs(model: Any, sample: dict[str, Any]) -> Tensor:
        """Of the completion. A token that the model does not know is `UNKNOWN`, and read as id 0."""
        ids = torch.tensor([sample["ids"]])
        readable = ids.where(ids < model.config.vocab_size, 0)
        scores = torch.log_softmax(model(readable).logits[0, :-1] / temperature, -1)
        known = ids[0, 1:] < scores.shape[1]
        values = scores.gather(1, ids[0, 1:, None].where(known[:, None], 0))[:, 0].where(known, UNKNOWN)
        return values[torch.tensor(sample["loss_mask"][1:])]

    frozen = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        old = [logprobs(student, sample) for sample in samples]
        advantages = [
            reference.reverse_kl_advantages(
                ours, logprobs(frozen, sample), torch.ones_like(ours), loss_config.kl_coef, loss_config.discount
            )
            for ours, sample in zip(old, samples, strict=True)
        ]
    optimizer = torch.optim.AdamW(student.parameters(), lr=optim.lr, betas=tuple(optim.betas), weight_decay=0.0)
    losses, norms = [], []
    for first in range(optim.substeps):
        part = range(first, len(samples), optim.substeps)
        values = torch.cat([logprobs(student, samples[i]) for i in part])
        per_token = reference.policy_gradient(
            values,
            torch.cat([advantages[i] for i in part]),
            None if loss_config.old_logprobs == "current" else torch.cat([old[i] for i in part]),
            loss_config.method,
            loss_config.clip_low,
            loss_config.clip_high,
            loss_config.dual_clip,
            loss_config.truncate_ratio,
        )
        per_token.mean().backward()
        losses.append(per_token.mean().item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), optim.max_grad_norm or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
    moments = [optimizer.state[parameter]["exp_avg"] for parameter in student.parameters()]
    return moments, sum(losses) / len(losses), sum(norms) / len(norms)


@pytest.mark.parametrize(
    "options",
    [
        {"batch__max_tokens": 1},
        {"batch__max_tokens": 40},
        {"batch__max_tokens": 40, "batch__layout": "packed"},
        {"batch__layout": "packed"},
    ],
    ids=["one-sample-each", "padded-40", "packed-40", "packed"],
)
def test_accumulation_changes_nothing(tmp_path: Path, pair: Pair, options: dict[str, object]) -> None:
    shared: dict[str, object] = {"optim__steps": 1, "optim__substeps": 2, "sampling__samples_per_prompt": 2}
    whole = run(tmp_path / "whole", pair, **shared)
    parts = run(tmp_path / "parts", pair, **shared, **options)
    assert [s["ids"] for s in parts.samples] == [s["ids"] for s in whole.samples]
    assert untimed(parts.metrics[0]) == pytest.approx(untimed(whole.metrics[0]), rel=1e-3, abs=1e-5)
    for a, b in zip(first_moments(parts.folder), first_moments(whole.folder), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


VARIANTS: dict[str, dict[str, object]] = {
    "lora": {"student__lora__rank": 2},
    "lora-named-layers": {"student__lora__rank": 2, "student__lora__target_modules": '["q_proj", "v_proj"]'},
    "lora-checkpointing": {"student__lora__rank": 2, "student__gradient_checkpointing": "true"},
    "lora-recompute": {"student__lora__rank": 2, "loss__old_logprobs": "recompute"},
    "bfloat16": {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16"},
    "bfloat16-lora": {"student__dtype": "bfloat16", "student__lora__rank": 2},
    "autocast": {"mixed_precision": "bf16"},
    "autocast-lora-recompute": {"mixed_precision": "bf16", "student__lora__rank": 2, "loss__old_logprobs": "recompute"},
    "eager-attention": {"student__attn_implementation": "eager", "teacher__attn_implementation": "eager"},
    "few-requests": {"sampling__max_requests": 2, "sampling__max_batch_tokens": 4},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_variants_learn_and_save(tmp_path: Path, pair: Pair, options: dict[str, object]) -> None:
    done = run(tmp_path / "run", pair, optim__steps=2, **options)
    for row in done.metrics:
        assert all(value == value for value in row.values())
        assert all(abs(value) < 1e6 for name, value in row.items() if not name.startswith("flops/"))
        assert row["optim/grad_norm"] > 0
    before, after = weights(pair.student), done.weights()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    dtype = torch.bfloat16 if options.get("student__dtype") else torch.float32
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    # Sampled and trained in the same precision up to autocast: what is scored is what was sampled.
    assert done.metrics[0]["sampler_mismatch/mean_abs"] < (0.05 if "b" in str(options) else 1e-5)


METRICS = {
    *("step", "teacher_kl", "entropy", "loss", "tokens_per_second", "optim/lr", "optim/grad_norm", "optim/skipped"),
    *("completions/mean_length", "completions/truncated_fraction"),
    *(f"policy/{name}" for name in ("ratio_mean", "ratio_min", "ratio_max", "clip_fraction", "k1", "k3")),
    *(f"sampler_mismatch/{name}" for name in ("mean_abs", "p95_abs", "outside_0.9_1.1")),
    *(f"flops/{name}" for name in ("sampling", "teacher", "student")),
    *(f"time/{name}" for name in ("sample", "teacher", "old_logprobs", "train")),
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
    sample = ContinuousBatchingSampler.sample

    def recorded(self: ContinuousBatchingSampler, prompts: list[list[int]], **options: Any) -> list[Completion]:
        completions = sample(self, prompts, **options)
        sampled.extend(zip(prompts, completions, strict=True))
        return completions

    monkeypatch.setattr(ContinuousBatchingSampler, "sample", recorded)
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


def test_the_seed_decides(tmp_path: Path, pair: Pair) -> None:
    first, again = run(tmp_path / "a", pair), run(tmp_path / "b", pair)
    assert [untimed(row) for row in again.metrics] == [untimed(row) for row in first.metrics]
    assert again.samples == first.samples
    a, b = first.weights(), again.weights()
    assert all(torch.equal(a[name], b[name]) for name in a)
    # With a single prompt, the order of prompts is not what tells two seeds apart.
    one, other = (run(tmp_path / f"{seed}", pair, seed=seed, data__limit=1, optim__steps=1) for seed in (0, 1))
    assert [s["ids"] for s in one.samples] != [s["ids"] for s in other.samples]


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


def test_the_teacher_and_the_base_of_an_adapter_do_not_move(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastkl.trainer.distill as module
    from fastkl.trainer.teachers import opening

    held: list[Any] = []
    load_teacher, fit = opening.load_teacher, module.fit

    def loaded(*arguments: Any) -> Any:
        held.append(load_teacher(*arguments))
        return held[-1]

    def fitted(student: Any, *arguments: Any) -> None:
        fit(student, *arguments)
        held.append(student.model)

    monkeypatch.setattr(opening, "load_teacher", loaded)
    monkeypatch.setattr(module, "fit", fitted)
    run(tmp_path / "run", pair, student__lora__rank=2, optim__lr=0.1)
    teacher, student = held
    for name, tensor in weights(pair.teacher).items():
        assert torch.equal(dict(teacher.named_parameters())[name], tensor)
        assert dict(teacher.named_parameters())[name].grad is None
    base = weights(pair.student)
    kept = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in student.named_parameters()}
    for name, tensor in base.items():  # merging for the saved folder and back leaves a rounding error
        torch.testing.assert_close(kept[name], tensor, atol=1e-6, rtol=1e-5)


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
