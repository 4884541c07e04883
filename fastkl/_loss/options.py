"""The keyword arguments of the losses, each declared once: name, type and default. `fastkl.loss` says what they mean.

A loss takes `**options: Unpack[ItsOptions]` and is decorated with `takes(ItsOptions)`. The decorator fills in the defaults,
refuses other names, and shows all of them in `help()`. A new option is a line here, and what the loss makes of it.

It also compares what the processes of a `group` were given, before anything is checked: all of them raise, or none. The
function itself has the `Piece` of this process as `group`, None for the whole head; that of a DTensor too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_type_hints

from torch import Tensor

from fastkl._loss import hints
from fastkl._loss.arguments import check_number
from fastkl._loss.heads.shares import find_piece
from fastkl.kernels.options import Backward, CrossEntropy, Direction, KLEstimate, Method, SampledTail, Surrogate, Tail
from fastkl.kernels.problem import Backend, HeadOptions, TeacherChunks

Ratio = Literal["token", "sequence"]
F = TypeVar("F", bound=Callable[..., Any])
Record = TypeVar("Record")


class HeadArguments(TypedDict, total=False):
    bias: Annotated[Tensor | None, None]
    temperature: Annotated[float, HeadOptions.temperature]
    logit_scale: Annotated[float, HeadOptions.logit_scale]
    softcap: Annotated[float | None, HeadOptions.softcap]


class GroupOptions(TypedDict, total=False):
    """Of every function of a head."""

    chunk_size: Annotated[int | None, None]
    group: Annotated[Any | None, None]  # a ProcessGroup, which not every build of torch has; or a DeviceMesh


class LikeliestOptions(HeadArguments, GroupOptions, total=False):
    vocab_size: Annotated[int | None, None]


class RankOptions(GroupOptions, total=False):
    """A rank is the same at any temperature, scale and soft-cap."""

    bias: Annotated[Tensor | None, None]
    vocab_size: Annotated[int | None, None]
    ignore_index: Annotated[int, -100]


class LogprobOptions(HeadArguments, GroupOptions, total=False):
    """Of every loss."""

    ignore_index: Annotated[int, -100]
    skip_zero_rows: Annotated[bool, True]
    backend: Annotated[Backend, "auto"]
    backward: Annotated[Backward, "exact"]
    weight_grad: Annotated[Tensor | None, None]


class TokenStatsOptions(LogprobOptions, total=False):
    vocab_size: Annotated[int | None, None]
    entropy_grad: Annotated[bool, True]


class LossOptions(LogprobOptions, total=False):
    """Of what is reduced over tokens."""

    mask: Annotated[Tensor | None, None]
    reduction: Annotated[str, "mean"]
    normalizer: Annotated[Tensor | float | None, None]


class CrossEntropyOptions(LossOptions, total=False):
    label_smoothing: Annotated[float, CrossEntropy.label_smoothing]
    z_loss: Annotated[float, CrossEntropy.z_loss]
    class_weight: Annotated[Tensor | None, None]
    vocab_size: Annotated[int | None, None]
    per_token: Annotated[bool, False]


class PolicyOptions(LossOptions, total=False):
    method: Annotated[Method, Surrogate.method]
    clip_low: Annotated[float, Surrogate.clip_low]
    clip_high: Annotated[float, Surrogate.clip_high]
    dual_clip: Annotated[float | None, Surrogate.dual_clip]
    truncate_ratio: Annotated[float | None, Surrogate.truncate_ratio]
    ratio: Annotated[Ratio, "token"]
    ratio_bounds: Annotated[tuple[float, float] | None, Surrogate.ratio_bounds]
    ref_logprobs: Annotated[Tensor | None, None]
    ref_kl_coef: Annotated[float, Surrogate.ref_kl_coef]
    ref_kl: Annotated[KLEstimate, Surrogate.ref_kl]
    ref_kl_ratio: Annotated[bool, Surrogate.ref_kl_ratio]
    entropy_coef: Annotated[float, 0.0]
    sequence_ids: Annotated[Tensor | None, None]


class SharedVocabularyOptions(LossOptions, total=False):
    """Of what compares distributions."""

    tokens: Annotated[Tensor | None, None]
    hard_coef: Annotated[float, 0.0]
    vocab_size: Annotated[int | None, None]
    squared_temperature: Annotated[bool, False]


class ListOptions(SharedVocabularyOptions, total=False):
    direction: Annotated[Direction, "reverse"]
    tail: Annotated[Tail, "bucket"]


class SampledTailOptions(TypedDict, total=False):
    token_teacher_logprobs: Annotated[Tensor | None, None]
    sampler_logprobs: Annotated[Tensor | None, None]
    tail_baseline: Annotated[Tensor | float | None, None]
    tail_weight: Annotated[float, SampledTail.tail_weight]
    truncate_ratio: Annotated[float | None, SampledTail.truncate_ratio]


class TopKOptions(ListOptions, SampledTailOptions, total=False): ...


class DivergenceOptions(SharedVocabularyOptions, total=False):
    teacher_logits: Annotated[Tensor | TeacherChunks | None, None]
    teacher_bias: Annotated[Tensor | None, None]
    teacher_temperature: Annotated[float | None, None]
    teacher_logit_scale: Annotated[float, HeadOptions.logit_scale]
    teacher_softcap: Annotated[float | None, HeadOptions.softcap]
    per_token: Annotated[bool, False]


class CommonOptions(HeadArguments, total=False):
    """Of a teacher with another vocabulary."""

    teacher_bias: Annotated[Tensor | None, None]
    teacher_temperature: Annotated[float | None, None]
    teacher_logit_scale: Annotated[float, HeadOptions.logit_scale]
    teacher_softcap: Annotated[float | None, HeadOptions.softcap]


# At import, because torch.compile does not trace `dataclasses.fields`.
_FIELDS: dict[Any, list[str]] = {
    kind: [field.name for field in dataclasses.fields(kind)]
    for kind in (HeadOptions, Surrogate, CrossEntropy, SampledTail)
}


def defaults_of(options: type) -> dict[str, Any]:
    """Those of a TypedDict of this module, by name."""
    return {name: kind.__metadata__[0] for name, kind in get_type_hints(options, include_extras=True).items()}


def takes(accepted: type) -> Callable[[F], F]:
    """Gives a function with `**options` the names and defaults of a TypedDict of this module."""
    defaults = defaults_of(accepted)
    kinds = {name: kind.__origin__ for name, kind in get_type_hints(accepted, include_extras=True).items()}
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind)
        for name, kind in kinds.items()
    ]

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        known = *(parameter.name for parameter in own), *defaults
        numbers = {*(parameter.name for parameter in own if parameter.annotation == "float"), *_of(kinds, float, int)}
        optional, whole = _of(kinds, float | None), _of(kinds, int)
        positional = [parameter.name for parameter in own if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    hint = hints.of_keyword(name, known, function.__name__)
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{hint}")
            if len(args) > len(positional):
                raise TypeError(
                    f"{function.__name__}() takes {len(positional)} arguments by position ({', '.join(positional)}) and "
                    f"got {len(args)}; give the others by name"
                )
            options = {**defaults, **given}
            if "group" in defaults:
                named = {**dict(zip(positional, args, strict=False)), **options}
                in_order = {name: named[name] for name in known if name in named}  # whatever the call's own order is
                options["group"] = find_piece(function.__name__, in_order)
            for name, value in given.items():
                if name in numbers or (name in optional and value is not None):
                    check_number(name, value, whole=name in whole)
            return function(*args, **options)

        call.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def _of(kinds: Mapping[str, Any], *wanted: Any) -> set[str]:
    return {name for name, kind in kinds.items() if kind in wanted}


def record(kind: type[Record], options: Mapping[str, Any], prefix: str = "") -> Record:
    """The dataclass `kind` from the options of its fields' names; it checks them, and errors name them with the prefix."""
    try:
        return kind(*[options[prefix + name] for name in _FIELDS[kind]])
    except ValueError as error:
        if not prefix:
            raise
        raise ValueError(f"{prefix}{error}") from None
