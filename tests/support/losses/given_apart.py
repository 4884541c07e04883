"""Calls in which the processes of a group are not given the same: one argument at a time, of every function of a head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fastkl import loss

OWN = ("weight", "student_weight", "bias", "weight_grad", "teacher_weight", "teacher_bias", "teacher_logits")
ROWS = torch.tensor([-0.5, -1.5, -0.25, -2.0])
INTEGERS = torch.tensor([0, 1, 2, 1])
HIDDEN = torch.linspace(-1.0, 1.0, 8).reshape(4, 2)
WHOLE = ("common_vocabulary_logits",)  # functions of whole heads alone: what they give is a function of all ids
LISTS = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
# Of the first process, and of the others. A second value need not be a right one: nothing is checked before.
VALUES: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("hidden", "student_hidden", "teacher_hidden"), (HIDDEN, HIDDEN.flip(0))),
    **dict.fromkeys(("tokens", "targets"), (INTEGERS, INTEGERS.roll(1))),
    **dict.fromkeys(("teacher_ids", "ids"), (LISTS, LISTS.flip(0))),
    "teacher_logprobs": (ROWS, ROWS * 1.01),
    "sampler_logprobs": (ROWS, ROWS.roll(1)),
    **dict.fromkeys(("old_logprobs", "ref_logprobs", "token_teacher_logprobs"), (ROWS, None)),
    **dict.fromkeys(("advantages", "env_advantages", "baseline"), (ROWS, ROWS.where(ROWS > -2.0, -2.01))),
    "sequence_ids": (torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])),
    "mask": (torch.tensor([True, True, True, False]), torch.tensor([True, True, True, True])),
    "class_weight": (torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.5])),
    "normalizer": (torch.tensor(4.0), torch.tensor(4.01)),
    "tail_baseline": (0.1, ROWS),
    "reduction": ("sum", "none"),
    "backend": ("auto", "torch"),
    "backward": ("exact", loss.Sparse(seed=1)),
    "method": ("ppo", "cispo"),
    "ratio": ("token", "sequence"),
    "ref_kl": ("k1", "k3"),
    "direction": ("reverse", "forward"),
    "tail": ("bucket", "drop"),
    "ratio_bounds": ((0.5, 2.0), (0.5, 2.5)),
    **dict.fromkeys(("k", "chunk_size", "vocab_size"), (2, 3)),
    "ignore_index": (-100, -1),
    **dict.fromkeys(("temperature", "softcap", "teacher_temperature"), (1.0, 0.0)),  # 0: that process would raise alone
}
FLAGS = ("skip_zero_rows", "entropy_grad", "per_token", "squared_temperature", "ref_kl_ratio", "normalized")
NUMBERS = (
    *("logit_scale", "teacher_logit_scale", "teacher_softcap", "clip_low", "clip_high", "dual_clip", "truncate_ratio"),
    *("ref_kl_coef", "entropy_coef", "label_smoothing", "z_loss", "hard_coef", "tail_weight", "coef", "discount"),
    *("power", "beta", "alpha"),
)
VALUES |= {**dict.fromkeys(FLAGS, (True, False)), **dict.fromkeys(NUMBERS, (0.5, 0.5000001))}


def functions() -> dict[str, Callable[..., Any]]:
    """Those that take the weight of a head, of which a process may have a part."""
    found = {name: getattr(loss, name) for name in loss.__all__ if name not in WHOLE}
    return {name: f for name, f in found.items() if inspect.isfunction(f) and parameters(f) & {*OWN[:2]}}


def parameters(function: Callable[..., Any]) -> set[str]:
    return {*inspect.signature(function).parameters}


def calls() -> list[tuple[str, str]]:
    """Each function with each argument that all processes have alike."""
    return [(name, given) for name, f in functions().items() for given in parameters(f) - {*OWN, "group"}]


def errors(rank: int, count: int) -> dict[tuple[str, str], str]:
    """What each of the calls raises, some in which a process has another head, and one in which all is alike."""
    weight = torch.ones(3, 2)
    heads: dict[str, tuple[Any, Any]] = {
        "no-tensor": (weight, [1.0]),
        "hidden-size": (weight, torch.ones(3, 4)),
        "dtype": (weight, weight.double()),
        "gradient": (weight, weight.clone().requires_grad_()),
        "dimensions": (weight, weight[0]),
    }
    found = {(name, given): _error(name, weight, rank, given) for name, given in calls()}
    found |= {("head", key): _error("linear_top_k", pair[rank > 0], rank) for key, pair in heads.items()}
    biases = torch.ones(3), torch.ones(4 if rank else 3), None if rank else torch.ones(3)
    found |= {("bias", str(i)): _error("linear_ranks", weight, rank, bias=bias) for i, bias in enumerate(biases)}
    with torch.set_grad_enabled(rank == 0):
        found["grad mode", ""] = _error("linear_logprobs", weight, rank)
    found["nothing", ""] = _error("linear_ranks", weight, rank)
    other = "linear_logprobs" if rank == 0 else "linear_cross_entropy"
    return found | {("function", ""): _error(other, weight, rank)}


def _error(name: str, weight: Any, rank: int, apart: str = "", **more: Any) -> str:
    accepted = inspect.signature(getattr(loss, name)).parameters
    head = "student_weight" if "student_weight" in accepted else "weight"
    needed = [key for key, one in accepted.items() if one.default is inspect.Parameter.empty and key not in OWN]
    values = {key: VALUES[key][key == apart and rank > 0] for key in {*needed, apart} - {""}}
    arguments = sorted({head: weight, **values, **more}.items(), key=lambda item: item[0], reverse=rank > 0)
    try:
        getattr(loss, name)(**dict(arguments), group=dist.group.WORLD)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
