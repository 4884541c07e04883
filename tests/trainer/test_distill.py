"""On-policy distillation end to end: what it learns, and that metrics and samples are what was sampled and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_cases import WORDS, check_equal, check_same_weights, counted, run
from tiny_data import sums
from transformers import AutoTokenizer

from fastkl.trainer.data.order import batch_indices
from fastkl.trainer.data.samples import UNKNOWN, Completion
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_teacher_kl_falls(tmp_path: Path, padded: Path, lora_rank: int) -> None:
    # Ties are undone by LoRA's layers: the student's own weights need to move more.
    longer: dict[str, object] = {"sampling__prompts_per_step": 12, "optim__steps": 40, "optim__warmup_steps": 2}
    done = run(tmp_path / "run", padded, student__lora__rank=lora_rank, optim__lr=0.03, **longer)
    assert [row["step"] for row in done.metrics] == list(range(1, 41))
    kl = [row["teacher_kl"] for row in done.metrics]
    assert sum(kl[-5:]) / 5 < 0.6 * sum(kl[:3]) / 3


def test_without_kl_and_with_equal_rewards_nothing_moves(tmp_path: Path, padded: Path) -> None:
    equal = {"reward__grader": "regex:$", "sampling__samples_per_prompt": 2}
    done = run(tmp_path / "run", padded, loss__kl_coef=0, optim__lr=0.1, **equal)
    assert all(row["optim/grad_norm"] == 0 for row in done.metrics)
    check_same_weights(done.folder, padded)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(tmp_path: Path, padded: Path) -> None:
    (row,) = run(tmp_path / "run", padded, teacher__path=padded / "student", optim__steps=1).metrics
    assert row["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert row["loss"] == pytest.approx(0, abs=1e-6)
    assert row["optim/grad_norm"] < 1e-5  # against about 1 with another teacher


def test_the_seed_decides(tmp_path: Path, padded: Path) -> None:
    first, again = run(tmp_path / "a", padded), run(tmp_path / "b", padded)
    check_equal(again.folder, first.folder)
    # With a single prompt, the order of prompts is not what tells two seeds apart.
    one, other = (run(tmp_path / f"{seed}", padded, seed=seed, data__limit=1, optim__steps=1) for seed in (0, 1))
    assert [s["ids"] for s in one.samples] != [s["ids"] for s in other.samples]


METRICS = {
    *("step", "teacher_kl", "entropy", "loss", "tokens_per_second", "optim/lr", "optim/grad_norm", "optim/skipped"),
    *("completions/mean_length", "completions/truncated_fraction", "completions/looping_fraction"),
    *("teacher_logprobs/mean", "teacher_logprobs/std"),
    *(f"policy/{name}" for name in ("ratio_mean", "ratio_min", "ratio_max", "clip_fraction", "k1", "k3")),
    *(f"sampler_mismatch/{name}" for name in ("mean_abs", "p95_abs", "outside_0.9_1.1", "kl")),
    *(f"flops/{name}" for name in ("sampling", "teacher", "student")),
    *(f"time/{name}" for name in ("sample", "teacher", "old_logprobs", "ranks", "train")),
}


def test_metrics_are_those_of_the_samples(tmp_path: Path, padded: Path) -> None:
    done = run(tmp_path / "run", padded, optim__substeps=3, optim__steps=2, batch__max_tokens=40, loss__discount=0.5)
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
    tmp_path: Path, padded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's head is padded beyond the tokenizer: some of what it samples has no text that would give it back."""
    sampled: list[tuple[list[int], Completion]] = []
    sample = GenerateSampler.sample

    def recorded(self: GenerateSampler, prompts: list[list[int]], **options: Any) -> list[Completion]:
        completions = sample(self, prompts, **options)
        sampled.extend(zip(prompts, completions, strict=True))
        return completions

    monkeypatch.setattr(GenerateSampler, "sample", recorded)
    done = run(tmp_path / "run", padded, sampling__samples_per_prompt=3)
    words = AutoTokenizer.from_pretrained(padded / "student")
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
