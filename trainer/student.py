"""The model being trained: its optimizer, its loss on samples, one update."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from fastkl.loss import LossOutput, policy_gradient_loss
from fastkl.trainer.checks import check_trackers
from fastkl.trainer.config.errors import ConfigError
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.optim import OptimConfig
from fastkl.trainer.config.training import RunConfig
from fastkl.trainer.data.batching import Batch, batches
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.flops import cost_of, scoring_flops, training_flops
from fastkl.trainer.models.loading import batch_layout, fuse, load_student


class Student:
    """The model being trained, with its optimizer and schedule, under accelerate."""

    def __init__(self, config: RunConfig, loss: LossConfig, temperature: float) -> None:
        check_trackers(config.trackers)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=config.trackers or None, project_dir=config.run
        )
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"started with {self.accelerator.num_processes} processes; this trainer runs in one (start it without "
                f"accelerate launch, or with --num_processes 1)"
            )
        set_seed(config.seed)
        self.config, self.loss, self.temperature = config, loss, temperature
        self.model = load_student(config.student).to(self.device)
        self.layout, self.cost = batch_layout(config.batch, self.model), cost_of(self.model)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        fused = fuse(self.model, "student")
        optimizer = torch.optim.AdamW(
            trainable,
            lr=config.optim.lr,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            weight_decay=config.optim.weight_decay,
        )
        self.scheduler = _scheduler(config.optim, optimizer)
        self.fused, self.optimizer = self.accelerator.prepare(fused, optimizer)
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.accelerator.register_save_state_pre_hook(_keep_trained)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def restore(self, folder: str) -> None:
        self.accelerator.load_state(folder, strict=False)  # what is not trained is as it was loaded

    def update(self, samples: list[Sample], step: int) -> dict[str, float]:
        """One step: `substeps` optimizer steps, each on the mean over its tokens, accumulated batch by batch."""
        optim, totals, norms = self.config.optim, defaultdict[str, float](float), []
        mismatch: list[Tensor] = []
        seeds = itertools.count((self.config.seed * 1_000_003 + step) << 20)  # a new one for each batch of a run
        self.fused.train()
        for first in range(optim.substeps):
            minibatch = samples[first :: optim.substeps]
            tokens = sum(sample.loss_tokens for sample in minibatch)
            for batch in batches(minibatch, self.config.batch.max_tokens, self.layout, self.device):
                output = self._loss(batch, tokens, next(seeds))
                self.accelerator.backward(output.loss)
                totals["loss"] += output.loss.item() / optim.substeps
                share = len(batch.tokens) / tokens / optim.substeps
                _add_policy_metrics(totals, output.metrics, share)
                if first == 0 and batch.samples[0].sampler_logprobs and output.logprobs is not None:
                    mismatch.append(output.logprobs - batch.per_token("sampler_logprobs"))
            norms.append(self._clip())
            self.optimizer.step()
            self.optimizer.zero_grad()
        metrics = {
            **totals,
            "optim/lr": float(self.scheduler.get_last_lr()[0]),
            "optim/grad_norm": sum(norms) / len(norms),
            "flops/student": self._flops(samples),
        }
        self.scheduler.step()
        return {**metrics, **_mismatch_metrics(mismatch)}

    def _loss(self, batch: Batch, normalizer: int, seed: int) -> LossOutput:
        old = batch.per_token("old_logprobs") if batch.samples[0].old_logprobs else None
        loss = self.loss

        def function(hidden: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            return policy_gradient_loss(
                hidden.flatten(0, 1)[batch.rows],
                weight,
                batch.tokens,
                batch.per_token("advantages"),
                old,
                method=loss.method,
                clip_low=loss.clip_low,
                clip_high=loss.clip_high,
                dual_clip=loss.dual_clip,
                truncate_ratio=loss.truncate_ratio,
                normalizer=normalizer,
                temperature=self.temperature,
                backward=loss.backward,
                grad_error=loss.grad_error,
                seed=seed if loss.backward == "sampled" else None,
                **head,
            )

        output: LossOutput = self.fused(function, **batch.inputs)
        return output

    def _flops(self, samples: list[Sample]) -> float:
        recomputed = scoring_flops(self.cost, samples) if self.loss.old_logprobs == "recompute" else 0.0
        return training_flops(self.cost, samples) + recomputed

    def _clip(self) -> float:
        limit = self.config.optim.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.fused.parameters(), float("inf") if limit is None else limit)
        return float(norm)


def _scheduler(config: OptimConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up that reaches the peak with step `warmup_steps`, then the schedule down to 0 after the last step.

    The first step already learns: a rollout is too dear for a step at rate 0.
    """
    decay = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2,
    }

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        return decay[config.schedule]((step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _keep_trained(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
    """Checkpoints hold what is trained, once: no frozen base under a LoRA adapter, no second name of a tied weight."""
    for model, state in zip(models, weights, strict=True):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name in dict(model.named_parameters(remove_duplicate=False)):
            if name not in trained:
                state.pop(name, None)


def _add_policy_metrics(totals: dict[str, float], metrics: dict[str, Tensor], share: float) -> None:
    """Adds those of a batch that holds `share` of the step's tokens; smallest and largest are not averaged."""
    for name, value in metrics.items():
        key, number = f"policy/{name}", value.item()
        extreme = {"ratio_min": min, "ratio_max": max}.get(name)
        if extreme is None:
            totals[key] = totals.get(key, 0.0) + number * share
        else:
            totals[key] = extreme(totals.get(key, number), number)


def _mismatch_metrics(differences: list[Tensor]) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's, before the update."""
    if not differences:
        return {}
    difference = torch.cat(differences)
    ratio = difference.exp()
    return {
        "sampler_mismatch/mean_abs": difference.abs().mean().item(),
        "sampler_mismatch/p95_abs": difference.abs().quantile(0.95).item(),
        "sampler_mismatch/outside_0.9_1.1": ((ratio < 0.9) | (ratio > 1.1)).float().mean().item(),
    }
