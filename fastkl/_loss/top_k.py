"""Distillation from a teacher that is known by its k likeliest tokens, as servers return them (`fastkl.loss`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.numbers import BadNumbers, check_logprobs, visible
from fastkl._loss.options import SampledTailOptions, TopKOptions, defaults_of, record, takes
from fastkl._loss.output import LossOutput, masked_mean, ratio_metrics
from fastkl._loss.rows import Call, divergence_output, flat_call, token_logprobs
from fastkl.kernels.divergence.formula import ROWS
from fastkl.kernels.options import DIRECTIONS, SampledTail, Tail
from fastkl.kernels.rows.interface import TailTokens
from fastkl.kernels.top_k.sampled import ROWS_WITH_TAIL, TailPerToken, ratio_of

_TAIL_DEFAULTS = defaults_of(SampledTailOptions)


@takes(TopKOptions)
def top_k_kl_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    teacher_ids: Tensor,  # [..., k] int64
    teacher_logprobs: Tensor,  # [..., k]
    **options: Unpack[TopKOptions],
) -> LossOutput:
    """KL divergence to a teacher of which only the k likeliest tokens are known; the student's side is exact.

    teacher_ids       [..., k], distinct ids of a row; −1 pads at the end of a row. One that takes part has an id at least.
                      They may be any ids, as the student's likeliest, if the teacher was asked for those.
    teacher_logprobs  [..., k], as the teacher normalised them over its whole vocabulary, at the temperature of this call.
    direction         "reverse", KL(student ‖ teacher), or "forward", KL(teacher ‖ student).
    tail              what becomes of the tokens that are not listed:
                      "bucket": one outcome of the teacher's remaining mass 1 − Σ q, on both sides. A lower bound of the
                      true divergence, 0 where student and teacher agree.
                      "renormalise": the teacher has nothing outside the list. Within it the divergence of both sides
                      renormalised, and −log of the student's mass within it on top, which makes leaving the list cost.
                      Biased: for two flat students its gradient was off by 42 and 91 % of the length of the reverse KL's
                      at 20 tokens, by 181 and 213 % at one (docs/objectives/objectives.md).
                      "drop": the terms of the listed tokens alone, as they are. Biased, and no divergence: it may be
                      negative, and in the reverse direction the student pays nothing for what is not listed. Its gradient
                      was off by 73 and 112 % there at 20 tokens, by 120 and 110 % at one.
                      "sampled": the bucket, and the sampled token in place of what the bucket does not see. Without bias:
                      on average the reverse KL over the whole vocabulary, and its gradient. See below.
    On an accelerator nobody looks at the ids: a list without one, or with one outside the vocabulary, makes its row NaN.
    A bias of −inf forbids a token outside the list, with a soft-cap or without. It forbids a listed token too, except under
    a soft-cap: the token's score is then −softcap, as in all other losses.
    The other arguments are those of the divergences (`fastkl.loss`). Formulas: `fastkl.kernels.top_k.formula`.

    A sampled tail is for direction "reverse", needs `tokens`, sampled at this temperature without top-p or top-k, and has
    options of its own. All other tails refuse them.

    token_teacher_logprobs  [...], the teacher's log-probs of `tokens`, normalised as the list's. Those of listed tokens say
                            nothing here. −inf makes the loss of another token infinite, as the true divergence is: put a
                            floor under them.
    sampler_logprobs        [...], log-probs of `tokens` under the policy that sampled them, for an importance ratio r.
                            None: the student itself did, r = 1. Log-ratios are clamped to ±20, as in
                            `policy_gradient_loss`.
    tail_baseline           c, a number or [...], in nats. It must not depend on the token itself. A running mean of
                            `LossOutput.per_token.gap` over earlier tokens outside the list lowers the variance. None: 0.
                            Under torch.compile give a number that changes as a 0-dim tensor: each float is a graph.
    tail_weight             w in [0, 1]. 1: without bias. Less trades noise for a part 1 − w of the bucket's bias.
    truncate_ratio          > 0: caps r, as in `policy_gradient_loss`. That has a bias of its own. None: no cap.

    With K the list, P and Q the masses of student and teacher on it, ρ = log((1 − P) / (1 − Q)), and d = log p − log q:

        value     bucket + w (r 1[y∉K] (d_y − ρ − c) + c (1 − P))
        gradient  ∇bucket + w (r 1[y∉K] (d_y − ρ − c) ∇log p_y + c ∇(1 − P))        the factor of ∇log p_y is a constant

    On average over y, at w = 1 without a cap, that is the gradient of KL(p ‖ q), for any c and finite ρ that y does not
    change:
        E r 1[y∉K] f_y ∇log p_y = Σ_{v∉K} f_v ∇p_v for any f, as r makes it a mean under p, and p ∇log p = ∇p.
        With f = d − ρ − c it is Σ_{v∉K} d_v ∇p_v − (ρ + c) ∇(1 − P), and c ∇(1 − P) is given back.
        ∇bucket = Σ_K (d_v + 1) ∇p_v + (ρ + 1) ∇(1 − P) = Σ_K d_v ∇p_v + ρ ∇(1 − P), as Σ_K ∇p_v + ∇(1 − P) = 0.
        The sum is Σ_v d_v ∇p_v, the gradient of Σ_v p_v d_v, as Σ_v ∇p_v = 0. The value: p in place of ∇p throughout.

    Metrics, over the rows that take part: top_k_kl_mean, top_k_kl_max. With a sampled tail they are of the value above, and
    there are also tail_share, the share of tokens outside the list; list_mass, the mean of P; bucket_kl, the mean of what
    the bucket gives; tail_gap, the mean of d_y − ρ over the tokens outside. With sampler_logprobs ratio_mean, ratio_min and
    ratio_max, before the cap, and clip_fraction, the share of tokens whose gradient the cap changed.
    `LossOutput.per_token` is then a `TailPerToken`.

    Raises TypeError or ValueError for arguments that do not fit, before anything is computed.
    """
    direction, tail = options["direction"], options["tail"]
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; use one of {', '.join(DIRECTIONS)}")
    if tail not in get_args(Tail):
        raise ValueError(f"tail is {tail!r}; use one of {', '.join(get_args(Tail))}")
    sampled = _check_tail(options)
    call = flat_call(hidden, weight, options["tokens"], options, "top_k")
    ids, logprobs = _check_list(teacher_ids, teacher_logprobs, hidden)
    if visible(ids):
        _look_at_list(ids[call.active], logprobs[call.active], call.vocabulary)
    ids = torch.where(call.active[:, None], ids, _placeholder(ids))
    logprobs = logprobs.to(call.token_weights.dtype)
    call = call._replace(
        inputs=call.inputs._replace(top_ids=ids, top_logprobs=logprobs),
        spec=call.spec._replace(variant=f"{direction}-{'bucket' if tail == 'sampled' else tail}"),
    )
    if sampled is not None:
        call = _with_tail(call, sampled, hidden, options)
    factor = options["temperature"] ** 2 if options["squared_temperature"] else 1.0
    output, values = divergence_output(call, "top_k_kl", factor)
    return output if sampled is None else _tail_output(call, output, values)


def _check_list(ids: Tensor, logprobs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and log-probs as [N, k]."""
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        if check.check_list(name, tensor, hidden).shape[-1] == 0:
            raise ValueError(f"{name} is {list(tensor.shape)}: expected at least one entry per token")
    if ids.shape != logprobs.shape:
        raise ValueError(f"teacher_ids is {list(ids.shape)} but teacher_logprobs is {list(logprobs.shape)}")
    check.check_integers("teacher_ids", ids)
    check.check_floats("teacher_logprobs", logprobs)
    if logprobs.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher_logprobs requires a gradient, and top_k_kl_loss has none for it: detach it")
    k = ids.shape[-1]
    return ids.to(torch.int64).reshape(-1, k), logprobs.reshape(-1, k)


def _placeholder(ids: Tensor) -> Tensor:
    """The list of a row that is left out, [1, k]: a token and padding, since ids that stand twice have no order."""
    return torch.nn.functional.pad(ids.new_zeros(1, 1), (0, ids.shape[1] - 1), value=-1)


def _look_at_list(ids: Tensor, logprobs: Tensor, vocabulary: int) -> None:
    """What can only be seen in the numbers, of rows that take part, and so on a CPU alone."""
    if bool((ids[:, 0] < 0).any()):
        raise ValueError("teacher_ids has a row without any id; mask such tokens out")
    check.check_listed_ids("teacher_ids", ids, vocabulary)
    ordered = ids.sort(-1).values
    again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(again.any()):
        raise ValueError(f"teacher_ids lists {int(ordered[..., 1:][again][0])} twice in a row; each id once")
    check_logprobs("teacher_logprobs", logprobs, ids >= 0)
    mass = logprobs.exp().where(ids >= 0, 0.0).sum(-1)
    if bool((mass > 1.01).any()):
        raise BadNumbers(
            f"teacher_logprobs of a row sum to a probability of {float(mass.max()):.4g}; they must be log-probs over the "
            f"whole vocabulary, not logits"
        )


def _check_tail(options: Mapping[str, Any]) -> SampledTail | None:
    """The options of a sampled tail, None for another one, which has none of them."""
    if options["tail"] != "sampled":
        for name, default in _TAIL_DEFAULTS.items():
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
    if hasattr(baseline, "__len__") and not isinstance(baseline, str):  # one for each token
        check.check_tensor("tail_baseline", baseline)
    elif baseline is not None:
        check.check_finite("tail_baseline", baseline)
    return record(SampledTail, options)


def _with_tail(call: Call, sampled: SampledTail, hidden: Tensor, options: Mapping[str, Any]) -> Call:
    """The call with what is known of its tokens."""
    teacher = token_logprobs(call, "token_teacher_logprobs", options["token_teacher_logprobs"], hidden)
    sampler = token_logprobs(call, "sampler_logprobs", options["sampler_logprobs"], hidden)
    assert teacher is not None
    tail = TailTokens(teacher, sampler, _baseline(call, options["tail_baseline"], hidden))
    return call._replace(inputs=call.inputs._replace(tail=tail), spec=call.spec._replace(tail=sampled))


def _baseline(call: Call, baseline: Tensor | float | None, hidden: Tensor) -> Tensor | None:
    """[N]; a number holds for all tokens."""
    if baseline is None:
        return None
    if not isinstance(baseline, Tensor):
        return torch.full_like(call.token_weights, baseline)
    if baseline.shape == call.shape or baseline.numel() != 1:
        found = call.per_row(check.check_per_token("tail_baseline", baseline, hidden))
    else:
        check.check_number("tail_baseline", baseline)
        found = baseline.reshape(()).to(call.token_weights).expand_as(call.token_weights)
    if visible(found) and not bool(found.isfinite().all()):
        raise BadNumbers("tail_baseline holds NaN or an infinity where the mask is not 0; it must be finite")
    return found


def _tail_output(call: Call, output: LossOutput, values: Tensor) -> LossOutput:
    """With the metrics and by-products of a sampled tail, from the values [K, ...]."""
    tail, active, given = call.spec.tail, call.active, call.inputs.tail
    assert tail is not None
    assert given is not None
    assert output.logprobs is not None
    rows = TailPerToken(*values[ROWS:ROWS_WITH_TAIL].reshape(len(TailPerToken._fields), -1))
    outside = active & (rows.outside != 0)
    metrics = {
        "tail_share": masked_mean(rows.outside, active),
        "list_mass": masked_mean(rows.list_mass, active),
        "bucket_kl": masked_mean(rows.bucket_kl, active),
        "tail_gap": masked_mean(rows.gap, outside),
    }
    if given.sampler_logprobs is not None:
        ratio = ratio_of(tail, output.logprobs.reshape(-1), given.sampler_logprobs)
        capped = (outside & (ratio.whole > ratio.value)).to(values.dtype)
        metrics |= {**ratio_metrics(ratio.whole, active), "clip_fraction": masked_mean(capped, active)}
    per_token = TailPerToken(*(row.reshape(call.shape) for row in rows._replace(outside=outside)))
    return output._replace(metrics={**output.metrics, **metrics}, per_token=per_token)
