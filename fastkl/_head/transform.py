"""What a model does to its head's output, measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkl._head.call import forward_replaced, head_computes, place_of_forward
from fastkl._head.model import find_head, first_not_finite

# Values that the head pretends to have computed, to see what the model makes of them.
PROBES = (-1e6, -40.0, -3.0, -0.01, 0.01, 0.5, 7.0, 90.0, 1e6)


class LogitTransform(NamedTuple):
    """What a model does to its head's output: softcap · tanh(logit_scale · x / softcap), or logit_scale · x."""

    logit_scale: float
    softcap: float | None


def measure_logit_transform(model: nn.Module) -> LogitTransform:
    """Scale and soft-cap between the head and the logits, read off what the model's forward makes of known values.

    Measured rather than read from the config, because configs disagree on names and on meaning: `logits_scaling` divides in
    Granite and multiplies in others. Each known value stands in one row, for every id of the vocabulary: what depends on
    the id shows as well.
    """
    name = type(model).__name__
    weight = find_head(model).weight
    shape = len(PROBES), getattr(weight, "ds_shape", weight.shape)[0]  # that of ZeRO-3, which takes the weights away
    absent = weight.is_meta or hasattr(weight, "ds_shape")
    probes = torch.tensor(PROBES, dtype=torch.float64, device="cpu" if absent else weight.device)
    logits = _logits_without_weights(model, probes, shape) if absent else _logits(model, probes, shape)
    if logits.shape != shape:
        raise ValueError(
            f"{name} makes logits of shape {list(logits.shape)} of {list(shape)} that its head gives; it cannot be fused"
        )
    seen = logits.double().cpu()
    probes = probes.cpu()
    usual = seen.nanmedian(-1).values  # over the ids: one that is treated apart does not count
    scale = float(usual[4] / probes[4])
    softcap = float(usual[-1]) if usual[-1] < 0.5 * scale * probes[-1] else None
    if softcap is not None:
        scale *= 1.0 + (scale * PROBES[4] / softcap) ** 2 / 3  # tanh(x) ≈ x (1 − x²/3) at the probe near 0
    known = probes * scale if softcap is None else softcap * torch.tanh(probes * scale / softcap)
    rtol = max(1e-3, 2 * torch.finfo(logits.dtype).eps)
    if not (scale > 0 and torch.allclose(usual, known, rtol=rtol)):
        raise ValueError(
            f"{name} does something to its logits that is neither a scale nor a soft-cap ({PROBES[5]} becomes "
            f"{float(usual[5]):.4g}, {PROBES[7]} becomes {float(usual[7]):.4g}) and cannot be fused"
        )
    odd = (~torch.isclose(seen, known[:, None], rtol=rtol)).T.nonzero()  # [n, 2] id, row
    if len(odd):
        token, row = odd[0].tolist()
        raise ValueError(
            f"{name} treats {len(odd[:, 0].unique())} ids of its vocabulary apart after the head: the logit of id {token} "
            f"becomes {float(seen[row, token]):.4g} where {float(known[row]):.4g} was expected; a model whose logits "
            f"depend on the id (masked ids, a bias) cannot be fused"
        )
    return LogitTransform(*(None if v is None else float(f"{v:.7g}") for v in (scale, softcap)))  # type: ignore[arg-type]


def numeric_settings(model: Any) -> dict[tuple[int, str], float]:
    """What a model's treatment of its logits may depend on: numbers of the model and of its configs, by place and name."""
    return {
        (place, name): value
        for place, owner in enumerate((model, *_configs(model.config)))
        for name, value in vars(owner).items()
        if isinstance(value, float) or (isinstance(value, int) and "logit" in name)  # ids and sizes are not meant
    }


def _configs(config: Any) -> Iterator[Any]:
    """A config and those within, as of the text model in one that sees images too."""
    yield config
    for name in getattr(config, "sub_configs", ()):
        part = getattr(config, name, None)
        if part is not None:
            yield from _configs(part)


def _logits(model: nn.Module, probes: Tensor, shape: tuple[int, int]) -> Tensor:
    """[n, V], what the model makes of the n probes in the place of its logits of one token."""

    def pretend(hidden: Tensor, head: nn.Linear) -> Tensor:
        if not hidden.isfinite().all():
            raise ValueError(_not_finite(model))
        _check_linear(model, head, hidden)
        return probes.to(hidden.device)[:, None, None].expand(*hidden.shape[:-1], shape[1]).clone()

    with torch.no_grad(), _evaluating(model), head_computes(model, pretend, replace_logits=True):
        ids = torch.zeros(shape[0], 1, dtype=torch.long, device=probes.device)
        # past what compiles the model: it would compile for these few tokens
        logits: Tensor = model.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
            :, -1
        ]
    return logits


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """While open, nothing is dropped: no random number is drawn that training would have drawn."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_linear(model: nn.Module, head: nn.Linear, hidden: Tensor) -> None:
    """A forward that someone else put on the head, as some packages quantise, must be that of a linear layer."""
    own = vars(head).get(place_of_forward(head))
    if own is None or head.weight.is_meta or hidden.shape[-1] != head.weight.shape[1]:
        return
    probe = torch.arange(1, hidden.shape[-1] + 1).sin().to(hidden).expand_as(hidden)  # those of one id may be all 0
    found, wanted = own(probe).double(), nn.functional.linear(probe, head.weight, head.bias).double()
    if (found - wanted).norm() > max(1e-4, torch.finfo(hidden.dtype).eps) * wanted.norm():
        raise TypeError(
            f"the LM head of {type(model).__name__} has a forward of its own ({getattr(own, '__qualname__', own)}) that is "
            f"not hidden @ weight.T + bias, and cannot be fused; leave it out of quantisation"
        )


def _logits_without_weights(model: nn.Module, probes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The same for a model whose weights come later, as FSDP's other processes load one: nothing before its head runs."""
    hidden = torch.zeros(shape[0], 1, 1, device=probes.device)
    bodies = [model.base_model, model.get_decoder()]  # type: ignore[operator]
    try:
        with contextlib.ExitStack() as stack:
            for body in {id(body): body for body in bodies if body is not model}.values():
                stack.enter_context(forward_replaced(body, lambda *_, **__: _BodyOutput((hidden,))))
            return _logits(model, probes, shape)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} has no weights yet, and what it does to its logits cannot be seen without ({error}); "
            f"load them before fuse"
        ) from error


class _BodyOutput(tuple[Tensor]):
    """What a model's body gives to its head, in each way in which models ask for it; anything else is None."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _not_finite(model: nn.Module) -> str:
    found = first_not_finite(model)
    cause = "though its weights are" if found is None else f"and neither is its weight {found}: the weights are damaged"
    return f"the hidden states of {type(model).__name__} are not finite for one token, {cause}"
