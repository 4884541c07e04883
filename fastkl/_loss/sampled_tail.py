"""What the sampled tokens add to a list of the teacher's likeliest ones (`fastkl.loss.top_k_kl_loss`, tail="sampled")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkl._loss import arguments as check
from fastkl._loss.numbers import BadNumbers, check_logprobs, visible
from fastkl._loss.options import record
from fastkl._loss.output import LossOutput, masked_extreme, masked_mean
from fastkl._loss.rows import Call
from fastkl.kernels.options import SampledTail
from fastkl.kernels.rows.interface import TailTokens
from fastkl.kernels.top_k.sampled import TailPerToken, ratio_of

DEFAULTS = {
    "token_teacher_logprobs": None,
    "sampler_logprobs": None,
    "tail_baseline": None,
    "tail_weight": SampledTail.tail_weight,
    "truncate_ratio": SampledTail.truncate_ratio,
}


def check_tail(options: Mapping[str, Any]) -> SampledTail | None:
    """The options of a sampled tail, None for another one, which has none of them."""
    if options["tail"] != "sampled":
        for name, default in DEFAULTS.items():
            if (value := options[name]) is not default and (default is None or value != default):
                given = "given" if isinstance(value, Tensor) else value
                raise ValueError(f'{name} is {given} but tail is {options["tail"]!r}; it belongs to tail="sampled"')
        return None
    if options["direction"] != "reverse":
        raise ValueError(
            f'tail is "sampled" but direction is {options["direction"]!r}: tokens of the student stand for the tail of '
            f'direction="reverse" alone'
        )
    for name, what in (
        ("tokens", "the sampled tokens"),
        ("token_teacher_logprobs", "the teacher's log-probs of tokens"),
    ):
        if options[name] is None:
            raise ValueError(f'tail is "sampled" and needs {what}: pass {name}=')
    if options["truncate_ratio"] is not None and options["sampler_logprobs"] is None:
        raise ValueError(
            f"truncate_ratio is {options['truncate_ratio']} and needs sampler_logprobs: without them every ratio is 1"
        )
    baseline = options["tail_baseline"]
    if baseline is not None and not isinstance(baseline, Tensor):
        check.check_finite("tail_baseline", baseline)
    return record(SampledTail, options)


def with_tail(call: Call, sampled: SampledTail, hidden: Tensor, options: Mapping[str, Any]) -> Call:
    """The call with what is known of its tokens."""
    teacher = _logprobs(call, "token_teacher_logprobs", options["token_teacher_logprobs"], hidden)
    sampler = _logprobs(call, "sampler_logprobs", options["sampler_logprobs"], hidden)
    assert teacher is not None
    tail = TailTokens(teacher, sampler, _baseline(call, options["tail_baseline"], hidden))
    return call._replace(inputs=call.inputs._replace(tail=tail), spec=call.spec._replace(tail=sampled))


def _logprobs(call: Call, name: str, logprobs: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Of the tokens, [N]."""
    if logprobs is None:
        return None
    found = call.per_row(check.check_per_token(name, logprobs, hidden))
    check_logprobs(name, found)
    return found


def _baseline(call: Call, baseline: Tensor | float | None, hidden: Tensor) -> Tensor | None:
    """[N]; a number holds for all tokens."""
    if baseline is None:
        return None
    if not isinstance(baseline, Tensor):
        return torch.full_like(call.token_weights, baseline)
    if baseline.dim() > 0 or call.shape == baseline.shape:
        found = call.per_row(check.check_per_token("tail_baseline", baseline, hidden))
    else:
        check.check_number("tail_baseline", baseline)
        found = baseline.to(call.token_weights).expand_as(call.token_weights)
    if visible(found) and not bool(found.isfinite().all()):
        raise BadNumbers("tail_baseline holds NaN or an infinity where the mask is not 0; it must be finite")
    return found


def tail_output(call: Call, output: LossOutput, values: Tensor) -> LossOutput:
    """With the metrics and by-products of a sampled tail, from the values [K, ...]."""
    tail, active, given = call.spec.tail, call.active, call.inputs.tail
    assert tail is not None
    assert given is not None
    assert output.logprobs is not None
    outside, list_mass, bucket_kl, gap = rows = values[2:6].reshape(4, -1)
    is_outside = active & (outside != 0)
    metrics = {
        "tail_share": masked_mean(outside, active),
        "list_mass": masked_mean(list_mass, active),
        "bucket_kl": masked_mean(bucket_kl, active),
        "tail_gap": masked_mean(gap, is_outside),
    }
    if given.sampler_logprobs is not None:
        ratio = ratio_of(tail, output.logprobs.reshape(-1), given.sampler_logprobs)
        capped = (is_outside & (ratio.whole > ratio.value)).to(gap.dtype)
        metrics |= {
            "ratio_mean": masked_mean(ratio.whole, active),
            "ratio_min": masked_extreme(ratio.whole, active, largest=False),
            "ratio_max": masked_extreme(ratio.whole, active, largest=True),
            "clip_fraction": masked_mean(capped, active),
        }
    shaped = rows.reshape(4, *call.shape)
    per_token = TailPerToken(is_outside.reshape(call.shape), *shaped[1:])
    return output._replace(metrics={**output.metrics, **metrics}, per_token=per_token)
