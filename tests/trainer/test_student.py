"""Updates of the student: each option against the same step by hand, whatever the batches; variants learn and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import as_optimized, completion_logprobs, counted, first_moments, run, untimed, weights
from run_settings import config, distillation
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl import reference
from fastkl.trainer import distill as distillation_module
from fastkl.trainer.data.samples import UNKNOWN
from fastkl.trainer.teachers import open as opening

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
def test_a_step_equals_the_same_step_by_hand(tmp_path: Path, padded: Path, options: dict[str, object]) -> None:
    settings = config("distill", distillation(tmp_path, padded, **options))
    done = run(tmp_path / "run", padded, optim__steps=1, **options)
    student = AutoModelForCausalLM.from_pretrained(padded / "student")
    moments, loss, norm = by_hand(student, padded / "teacher", done.samples, settings)
    assert done.metrics[0]["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert done.metrics[0]["optim/grad_norm"] == pytest.approx(norm, rel=1e-3)
    for (name, _), found, wanted in zip(as_optimized(student), first_moments(done.folder), moments, strict=True):
        error, scale = (found - wanted).abs().max(), wanted.abs().max()
        assert error <= 2e-3 * scale, f"{name}: off by {error} at a scale of {scale}"


def by_hand(
    student: Any, teacher: Path, samples: list[dict[str, Any]], settings: Any
) -> tuple[list[Tensor], float, float]:
    """One step with the models' own logits and torch's own AdamW: Adam's moments, loss, mean gradient norm."""
    loss_config, optim, temperature = settings.loss, settings.optim, settings.sampling.temperature

    def logprobs(model: Any, sample: dict[str, Any]) -> Tensor:
        """Of the completion. A token that the model does not know is `UNKNOWN`."""
        scores = completion_logprobs(model, sample, temperature)
        tokens = torch.tensor(counted(sample, "ids"))
        known = tokens < scores.shape[1]
        return scores.gather(1, tokens[:, None].where(known[:, None], 0))[:, 0].where(known, UNKNOWN)

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
    limits = loss_config.clip_low, loss_config.clip_high, loss_config.dual_clip, loss_config.truncate_ratio
    losses, norms = [], []
    for first in range(optim.substeps):
        part = range(first, len(samples), optim.substeps)
        values = torch.cat([logprobs(student, samples[i]) for i in part])
        part_old = None if loss_config.old_logprobs == "current" else torch.cat([old[i] for i in part])
        part_advantages = torch.cat([advantages[i] for i in part])
        per_token = reference.policy_gradient(values, part_advantages, part_old, loss_config.method, *limits)
        per_token.mean().backward()
        losses.append(per_token.mean().item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), optim.max_grad_norm or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()
    moments = [optimizer.state[parameter]["exp_avg"] for _, parameter in as_optimized(student)]
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
def test_accumulation_changes_nothing(tmp_path: Path, padded: Path, options: dict[str, object]) -> None:
    shared: dict[str, object] = {"optim__steps": 1, "optim__substeps": 2, "sampling__samples_per_prompt": 2}
    whole = run(tmp_path / "whole", padded, **shared)
    parts = run(tmp_path / "parts", padded, **shared, **options)
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
def test_variants_learn_and_save(tmp_path: Path, padded: Path, options: dict[str, object]) -> None:
    done = run(tmp_path / "run", padded, optim__steps=2, **options)
    for row in done.metrics:
        assert all(value == value for value in row.values())
        assert all(abs(value) < 1e6 for name, value in row.items() if not name.startswith("flops/"))
        assert row["optim/grad_norm"] > 0
    before, after = weights(padded / "student"), done.weights()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    dtype = torch.bfloat16 if options.get("student__dtype") else torch.float32
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    # Sampled and trained in the same precision up to autocast: what is scored is what was sampled.
    assert done.metrics[0]["sampler_mismatch/mean_abs"] < (0.05 if "b" in str(options) else 1e-5)


def test_the_teacher_and_the_base_of_an_adapter_do_not_move(
    tmp_path: Path, padded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    load_teacher, fit = opening.load_teacher, distillation_module.fit

    def loaded(*arguments: Any) -> Any:
        held.append(load_teacher(*arguments))
        return held[-1]

    def fitted(student: Any, *arguments: Any) -> None:
        fit(student, *arguments)
        held.append(student.model)

    monkeypatch.setattr(opening, "load_teacher", loaded)
    monkeypatch.setattr(distillation_module, "fit", fitted)
    run(tmp_path / "run", padded, student__lora__rank=2, optim__lr=0.1)
    teacher, student = held
    for name, tensor in weights(padded / "teacher").items():
        assert torch.equal(dict(teacher.named_parameters())[name], tensor)
        assert dict(teacher.named_parameters())[name].grad is None
    kept = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in student.named_parameters()}
    for name, tensor in weights(
        padded / "student"
    ).items():  # merging for the saved folder and back leaves a rounding error
        torch.testing.assert_close(kept[name], tensor, atol=1e-6, rtol=1e-5)
