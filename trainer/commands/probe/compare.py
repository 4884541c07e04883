"""The numbers of a probe: how far student and teacher are apart, where, and what each scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastkl.loss import linear_list_logprobs, linear_token_stats, linear_top_k
from fastkl.trainer.commands.probe.opened import Opened
from fastkl.trainer.commands.probe.written import GREEDY, SAMPLED, Score, Scores, Written
from fastkl.trainer.data.arrays import Array
from fastkl.trainer.data.batching import Batch, batches
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.data.step_metrics import as_metrics, rollout_means, teacher_kl
from fastkl.trainer.models.scoring import call_with_rows, readable, scoring
from fastkl.trainer.models.sizes.flops import has_experts
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.rollouts.grading.statistics import mean, standard_error
from fastkl.trainer.runs.guards.measures import gaps, measures, top_share
from fastkl.trainer.runs.sharing.mismatch import mismatch_metrics

PERCENTILES = (1, 5, 50, 95, 99)
ALIGNED = 3  # samples that are shown as they are aligned


def figures(found: Opened, written: Written) -> dict[str, Any]:
    """All but the cost of the run; as JSON has it."""
    samples = written.samples
    own, compared = _students(found, samples)
    d = [gaps_of_segments(sample) for sample in samples]
    every = np.concatenate(d)
    metrics = as_metrics([rollout_means(samples) | teacher_kl(samples)]) | measures(samples) | own.pop("mismatch")
    metrics["advantages/top_share"] = top_share(every)  # where nothing tames them, advantages are −d
    return {
        "prompts": len({sample.prompt_index for sample in samples}),
        "samples": len(samples),
        "tokens": sum(sample.loss_tokens for sample in samples),
        "unit": "segment" if any(len(sample.segments) for sample in samples) else "token",
        "alignment": _alignment(found, written),
        "temperature": found.config.sampling.temperature,
        "vocabularies": [vocabulary(tokenizer) for tokenizer in _tokenizers(found)],
        "has_experts": has_experts(found.student.model),
        "accuracy": _accuracies(written),
        "teacher_kl": _spread(every),
        "entropy": _spread(own["entropies"]),
        "top_k": compared,
        "share_of_gap": _shares(samples, d),
        "metrics": metrics,
        "missing": written.missing,
    }


def _tokenizers(found: Opened) -> list[PreTrainedTokenizerBase]:
    """The student's, and those of teachers that have another."""
    return [found.prepared.tokenizer, *(own.reader.tokenizer for own in found.prepared.teacher_prompts.own.values())]


def gaps_of_segments(sample: Sample) -> Array:
    """d of each segment that the teacher judges, in order; of each token where these are all segments."""
    values = gaps(sample)
    if not len(sample.segments) or not len(values):
        return values
    _, places = np.unique(sample.segments[sample.scored], return_inverse=True)
    return np.bincount(places, values)


def _alignment(found: Opened, written: Written) -> dict[str, Any]:
    """How completions and their teachers' tokens fit together; nothing where all have one tokenizer."""
    counts, own = written.aligned, found.prepared.teacher_prompts.own
    if not own:
        return {}
    judged = [s for s in written.samples if s.dataset in own]
    total = sum(float(gaps(sample).sum()) for sample in judged)
    return {
        **{name.removeprefix("alignment/"): value for name, value in counts.metrics().items()},
        "teacher_kl_per_byte": total / max(1, counts.bytes),
        "samples": [dict(zip(("student", "teacher"), own[s.dataset].lines(s), strict=True)) for s in judged[:ALIGNED]],
    }


def _spread(values: Array) -> dict[str, float]:
    """Mean and percentiles."""
    if not len(values):
        return {}
    points = zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True)
    return {"mean": float(values.mean()), **{f"p{percent:02d}": value for percent, value in points}}


def _shares(samples: Sequence[Sample], gaps: Sequence[Array]) -> dict[str, float]:
    """What first tokens, last tokens and 1 % of all tokens have of Σ|d|; and the mean |d| of first and last tokens.

    Of a teacher with its own tokenizer, segments in place of tokens. A completion that is cut has no last token of its own.
    """
    every = np.abs(np.concatenate(gaps))
    firsts = np.abs([own[0] for own in gaps if len(own)])
    lasts = np.abs([own[-1] for sample, own in zip(samples, gaps, strict=True) if len(own) and not sample.truncated])
    total = float(every.sum()) or 1.0
    return {
        "first_token": float(firsts.sum()) / total,
        "last_token": float(lasts.sum()) / total,
        "top_1_percent": top_share(every),
        "first_tokens_of_all": len(firsts) / len(every),
        "last_tokens_of_all": len(lasts) / len(every),
        "first_token_mean": float(firsts.mean()) if len(firsts) else 0.0,
        "last_token_mean": float(lasts.mean()) if len(lasts) else 0.0,
    }


def _accuracies(written: Written) -> dict[str, Any]:
    """Means with their standard errors; the gap is the teacher's less the student's.

    The error of a gap is that of the difference by prompt: both answered the same ones.
    """
    found: dict[str, Any] = {"student": _means(written.student), "teacher": _means(written.teacher)}
    both = [way for way in (GREEDY, SAMPLED) if way in found["student"] and way in found["teacher"]]
    found["gap"] = {way: found["teacher"][way]["mean"] - found["student"][way]["mean"] for way in both}
    found["gap_se"] = {way: _paired_error(written.student[way], written.teacher[way]) for way in both}
    return found


def _means(scores: Scores) -> dict[str, dict[str, float | None]]:
    return {way: _with_error(values) for way, values in scores.items()}


def _with_error(scores: Sequence[Score]) -> dict[str, float | None]:
    values = [score.value for score in scores]
    return {"mean": mean(values), "se": standard_error(values, [score.prompt for score in scores])}


def _paired_error(ours: Sequence[Score], theirs: Sequence[Score]) -> float | None:
    """The standard error of the mean difference by prompt."""
    means = [_by_prompt(scores) for scores in (theirs, ours)]
    both = sorted(means[0].keys() & means[1].keys())
    return standard_error([means[0][prompt] - means[1][prompt] for prompt in both], both)


def _by_prompt(scores: Sequence[Score]) -> dict[int, float]:
    values = defaultdict[int, list[float]](list)
    for score in scores:
        values[score.prompt].append(score.value)
    return {prompt: mean(each) for prompt, each in values.items()}


def _students(found: Opened, samples: Sequence[Sample]) -> tuple[dict[str, Any], dict[str, float]]:
    """What the student says in a forward pass: entropies, how far it is from its sampler, and of the likeliest tokens."""
    student, temperature = found.student, found.config.sampling.temperature
    entropies, pairs, tops = [], [], []
    with student.gathered(), scoring(student.wrapped), student.autocast():
        for group in found.teachers.groups(samples):
            for batch in batches(group, found.config.batch.max_tokens, student.layout, student.device):
                logprobs, entropy, top = _of_batch(found, batch, temperature)
                entropies.append(entropy.cpu())
                pairs.append(batch.beside_sampler(logprobs).cpu())
                tops += [] if top is None else [top.cpu()]
    compared = {}
    if tops:
        overlap, ours, theirs = torch.cat(tops).double().mean(0).tolist()
        compared = {"k": _k(samples), "overlap": overlap, "student_mass": ours, "teacher_mass": theirs}
    return {"entropies": torch.cat(entropies).numpy(), "mismatch": mismatch_metrics(pairs)}, compared


def _k(samples: Sequence[Sample]) -> int:
    return next(sample.teacher_top_k.ids.shape[1] for sample in samples if sample.teacher_top_k is not None)


def _of_batch(found: Opened, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs [n], entropies [n], and [n, 3]: the share of the teacher's list that is on the student's, and what
    probability student and teacher give to the teacher's list."""
    own = batch.samples[0].dataset in found.prepared.teacher_prompts.own  # whose lists are of what both have alone
    listed = not own and all(sample.teacher_top_k is not None for sample in batch.samples)
    likeliest = batch.top_k() if listed else None
    cut = found.teachers.of(batch.samples).vocab_size

    def values(rows: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        stats = linear_token_stats(rows, weight, batch.tokens, temperature=temperature, **head)
        if likeliest is None:
            return stats.logprobs, stats.entropies, None
        options = {"temperature": temperature, "vocab_size": cut if cut != len(weight) else None, **head}
        ours = linear_top_k(rows, weight, likeliest.ids.shape[1], **options).ids
        known = likeliest.ids >= 0
        common = (likeliest.ids[:, :, None] == ours[:, None, :]).any(-1) & known
        mass = linear_list_logprobs(rows, weight, likeliest.ids, **options).exp().where(known, 0.0).sum(-1)
        theirs = likeliest.logprobs.exp().where(known, 0.0).sum(-1)
        shared = common.sum(-1) / known.sum(-1).clamp(min=1)
        return stats.logprobs, stats.entropies, torch.stack([shared, mass, theirs], -1)

    model = found.student.wrapped
    return call_with_rows(model, batch, values, readable(model, batch))
