"""The model being trained: its optimizer, its loss on samples, one update."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastkl.trainer.config.training import RunConfig
from fastkl.trainer.data.batching import Batch, batches
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.data.step_metrics import PolicyMetrics
from fastkl.trainer.errors import RunError
from fastkl.trainer.models.loading import fuse, load_student
from fastkl.trainer.models.modes import updating
from fastkl.trainer.models.optimizer import apply_settings, learning_rate_schedule, make_optimizer
from fastkl.trainer.models.precision import Counts, unchanged_fraction
from fastkl.trainer.models.scoring import (
    batch_likeliest,
    batch_logprobs,
    batch_ranks,
    batch_stats,
    check_finite,
    scatter_values,
    scoring,
)
from fastkl.trainer.models.self_checks.layouts import batch_layout
from fastkl.trainer.models.self_checks.probe import Probe
from fastkl.trainer.models.self_checks.update import check_update
from fastkl.trainer.models.sharding import GatheredCopy, head_gathered_once, name_layers
from fastkl.trainer.models.sizes.flops import cost_of, training_flops
from fastkl.trainer.runs import checkpoint, processes
from fastkl.trainer.runs.identity import weights_fingerprint
from fastkl.trainer.runs.sharing.mismatch import mismatch_metrics
from fastkl.trainer.runs.sharing.samples import lent

if TYPE_CHECKING:
    from fastkl.trainer.objectives.base import Objective


class Follower(Protocol):
    """What keeps weights of its own that follow the student's. All processes tell it the same, at the same time."""

    def stepped(self) -> None:
        """An optimizer step was taken; one that is skipped is none."""

    def updated(self, steps_done: int) -> None:
        """The last optimizer step of a run's step was taken, or skipped."""


class Student:
    """The model being trained, with its optimizer and schedule, under accelerate.

    `model` is the plain Transformers (or peft) model; where FSDP shards it, it has weights only inside `gathered()`.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        set_seed(config.seed)
        self.config = config
        self.model = fuse(load_student(config.student, self.device), "student")
        self.fingerprint = weights_fingerprint(self.model)  # before the first update
        self.version = 0  # of the weights: another one after every change
        self.cost = cost_of(self.model)
        self._gathered_copy = GatheredCopy(self.model) if accelerator.is_fsdp2 else None
        probe = Probe(self.model, "student")
        self.layout = batch_layout(config.batch, self.model, probe)
        check_update(probe, config.student.dropout)
        optimizer = make_optimizer(config.optim, self.model)
        self.scheduler = learning_rate_schedule(config.optim, optimizer)
        name_layers(self.model)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        # Without accelerate's autocast: what samples has the model's own dtype. Scores and updates enter `autocast`.
        self.plain = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        if self._gathered_copy is not None:
            self.model = self._gathered_copy.model
        self._skipped = 0  # optimizer steps in a row
        self._also_checkpointed: dict[str, Any] = {}
        self._followers: list[Follower] = []
        set_seed(config.seed, device_specific=True)  # weights start equal; what is drawn differs

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """While open, `model` has its current weights; entered and left by all processes together."""
        copied = self._gathered_copy
        with contextlib.nullcontext() if copied is None else copied.gathered(self.plain):
            yield

    @property
    def sharded(self) -> bool:
        """Whether FSDP holds the weights in shards."""
        return any(isinstance(parameter, DTensor) for parameter in self.wrapped.parameters())

    def save(self, folder: Path) -> None:
        checkpoint.save(folder, self.plain, self.optimizer, self._others)

    def restore(self, folder: Path) -> None:
        checkpoint.load(folder, self.plain, self.optimizer, self._others)
        apply_settings(self.config.optim, self.optimizer, self.scheduler)
        self.version += 1

    def take_weights(self, folder: Path) -> None:
        """Those of a checkpoint, to be saved; the optimizer's state stays."""
        checkpoint.load_weights(folder, self.plain)
        self.version += 1

    def follow(self, follower: Follower) -> None:
        """Tells it of every optimizer step and every update."""
        self._followers.append(follower)

    def also_checkpoint(self, name: str, state: Any) -> None:
        """Saves and restores `state.state_dict()` with every checkpoint."""
        self._also_checkpointed[name] = state

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of the run's rows and first weights, by what they are of."""
        return dict(self._also_checkpointed["identity"].state_dict())

    @property
    def _others(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {"scheduler": self.scheduler, **self._also_checkpointed} | ({} if scaler is None else {"scaler": scaler})

    def score(self, samples: list[Sample], field: str, temperature: float) -> None:
        """Writes the log-probs of this process's samples into their list `field`, as the coming update sees them."""
        self._scatter(
            samples, field, lambda batch: check_finite(batch_logprobs(self.wrapped, batch, temperature), "student")
        )

    def measure_entropies(self, samples: list[Sample], temperature: float, field: str | None = None) -> None:
        """Writes `student_entropies` of this process's samples, and from the same pass their log-probs into `field`."""

        def entropies(batch: Batch) -> Tensor:
            logprobs, found = batch_stats(self.wrapped, batch, temperature)
            if field is not None:
                batch.scatter(check_finite(logprobs, "student"), field)
            return found

        self._scatter(samples, "student_entropies", entropies)

    def rank(self, samples: list[Sample], vocab_size: int) -> None:
        """Writes `student_ranks` of this process's samples, as the coming update sees them: see `batch_ranks`."""
        self._scatter(samples, "student_ranks", lambda batch: batch_ranks(self.wrapped, batch, vocab_size))

    def list_likeliest(self, groups: list[list[Sample]], k: int, known: Callable[[list[Sample]], int | None]) -> None:
        """Writes `student_top_k` of this process's samples: the k likeliest ids, as the coming update sees them.

        Args:
            groups: Samples apart by what cannot share a batch.
            known: Of a batch's samples: the ids come from below this one; None: from the whole head.
        """
        with self.autocast(), scoring(self.wrapped):
            for batch, _ in self._in_step(groups):
                batch.scatter_student_top_k(batch_likeliest(self.wrapped, batch, k, known(batch.samples)))

    def measure(
        self, groups: list[list[Sample]], field: str, values: Callable[[Callable[..., Any], Batch], Tensor]
    ) -> None:
        """Writes `values(model, batch)` [n] of the counted tokens of this process's samples into their list `field`.

        The model is called as in the coming update, without gradients. A batch has samples of one group.
        """
        batches = (batch for batch, _ in self._in_step(groups))
        scatter_values(self.wrapped, batches, field, lambda batch: values(self._forward, batch))

    def _scatter(self, samples: list[Sample], field: str, values: Callable[[Batch], Tensor]) -> None:
        with self.autocast():
            scatter_values(self.wrapped, (batch for batch, _ in self._in_step([samples])), field, values)

    def _forward(self, **inputs: Any) -> Any:
        with self.autocast():
            return self.wrapped(**inputs)

    def autocast(self) -> AbstractContextManager[Any]:
        """That of `mixed_precision`; FSDP has a policy of its own instead."""
        return contextlib.nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.autocast()

    def update(self, samples: list[Sample], objective: Objective, step: int) -> dict[str, float]:
        """One step: `substeps` optimizer steps, each on the weighted mean over its tokens, accumulated batch by batch.

        Every process is given its own samples (`share_out`). Gradients are averaged over the processes, hence the factor.
        """
        optim, loss, policy, norms = self.config.optim, 0.0, PolicyMetrics(), []
        mismatch: list[Tensor] = []
        coarse = Counts(self.plain.parameters())
        # A new one for each batch of a run.
        seeds = itertools.count(((self.config.seed * 1_000_003 + step) << 20) + processes.rank(), processes.count())
        with updating(self.plain, self.config.student.dropout):
            for first in range(optim.substeps):
                own = [sample for sample in samples if sample.place % optim.substeps == first]
                own.sort(key=lambda sample: len(sample.ids))
                sums = {"weight": sum(s.weight for s in own), "tokens": sum(s.weighed_tokens for s in own)}
                weight, tokens = processes.add(sums).values()
                for batch, counts in self._in_step(objective.groups(own)):
                    output = objective(self._forward, batch, weight or 1, next(seeds))
                    self.accelerator.backward(output.loss * processes.count() * counts)
                    if not counts:
                        continue
                    loss += output.loss.item() / optim.substeps
                    if batch.weighed_tokens:
                        share = batch.weighed_tokens / tokens / optim.substeps
                        policy.add(output.metrics, share)
                    if first == 0 and output.logprobs is not None:
                        mismatch.append(batch.beside_sampler(output.logprobs).cpu())
                norms.append(self._clip())
                self._step(step, norms[-1], coarse)
                self.version += 1
        finite = [norm for norm in norms if math.isfinite(norm)]
        parts = processes.gather([(loss, policy, (coarse.seen, coarse.unchanged))])
        flops = training_flops(self.cost, samples) + objective.preparing_flops(self.cost, samples)
        metrics = {
            "loss": sum(loss for loss, *_ in parts),
            **PolicyMetrics.together([policy for _, policy, _ in parts]),
            **unchanged_fraction([counts for *_, counts in parts]),
            "optim/lr": float(self.scheduler.get_last_lr()[0]),
            "optim/grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "optim/skipped": len(norms) - len(finite),
            **processes.add({"flops/student": flops}),
        }
        self.scheduler.step()
        for follower in self._followers:
            follower.updated(step + 1)
        metrics |= objective.updated(samples)
        return {**metrics, **mismatch_metrics(mismatch)}

    def _in_step(self, groups: list[list[Sample]]) -> Iterator[tuple[Batch, bool]]:
        """Batches of this process's samples, as many as on every other: one that has fewer adds some that do not count.

        Forward and backward passes of DDP and FSDP meet those of the other processes. DDP's gradients meet in the last.
        """
        layout, device, limit = self.layout, self.device, self.config.batch.max_tokens
        own = [batch for group in groups for batch in batches(group, limit, layout, device)]
        counts = processes.gather([len(own)])
        shortest = min((s for group in groups for s in group), key=lambda s: len(s.ids), default=None)
        filler = lent(shortest, [count > 0 for count in counts])
        with head_gathered_once(self.wrapped):
            for index in range(max(counts)):
                last = index == max(counts) - 1 or self._gathered_copy is not None
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                    if index < len(own):
                        yield own[index], True
                    elif filler is not None:
                        yield next(batches([copy.copy(filler)], limit, layout, device)), False

    def _step(self, step: int, norm: float, coarse: Counts) -> None:
        """An optimizer step, or none where the gradient is not finite: the norm and so the decision is everyone's."""
        finite = math.isfinite(norm)
        if finite or self.accelerator.scaler is not None:  # a scaler skips by itself, and lowers its scale
            with coarse.around_step():
                self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            self._stepped()
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped == self.config.optim.max_skipped:
            raise RunError(
                f"the gradient's norm is {norm} in step {step + 1}, and not finite for the last {self._skipped} optimizer "
                f"steps (optim.max_skipped): nothing is learned any more. Lower optim.lr, or look for what is not finite "
                f"in the last rows of metrics.jsonl"
            )

    def _stepped(self) -> None:
        """The weights are others now: tells all that keep a copy of them."""
        if self._gathered_copy is not None:
            self._gathered_copy.follow(self.plain)
        for follower in self._followers:
            follower.stepped()

    def _clip(self) -> float:
        limit = self.config.optim.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), float("inf") if limit is None else limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
