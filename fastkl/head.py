"""The fused head: a Transformers causal LM whose last step is a fastkl loss instead of a matrix of logits.

    fused = FusedCausalLM(model)                          # model: any Transformers causal LM, or a peft model around one
    output = fused(lambda hidden, weight, **head:         # hidden [B, T, D], as the LM head receives them
        policy_gradient_loss(hidden[:, :-1], weight, ids[:, 1:], advantages, old_logprobs, **head),
        input_ids=ids, attention_mask=attention_mask)
    output.loss.backward()

The model's own forward runs, from embeddings to head; only the head module's `forward` is another one for the length of
the call. The weight is touched inside the head module alone, where the hooks of DDP, FSDP2, ZeRO and peft expect it, and
nothing of the model is changed for good: it saves as the ordinary model it is.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

# Values that the head pretends to have computed, to see what the model makes of them.
PROBES = (-1e6, -40.0, -3.0, -0.01, 0.01, 0.5, 7.0, 90.0, 1e6)


class LogitTransform(NamedTuple):
    """What a model does to its head's output: softcap · tanh(logit_scale · x / softcap), or logit_scale · x."""

    logit_scale: float
    softcap: float | None


class FusedCausalLM(nn.Module):
    """A causal LM whose forward takes a function of (hidden, weight, bias=, logit_scale=, softcap=) and returns its result.

    Building it runs the model on one token, to see what becomes of its logits. Raises TypeError for what is no causal LM
    (a model without its head, one inside DDP), and where the head is not a plain `nn.Linear` (a LoRA adapter on it, a
    quantised one), and ValueError where the model treats its logits in a way that
    fastkl.loss does not know, or where its hidden states are not finite.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.transform = measure_logit_transform(model)
        # What FSDP shards as units. A model may name what only others of its family have.
        has = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = [
            name for name in getattr(model, "_no_split_modules", None) or [] if name in has
        ] or None

    def forward(self, function: Callable[..., T] | None = None, **inputs: Any) -> T:
        """`inputs` go to the model: input_ids and, as the case may be, attention_mask, position_ids, …; `use_cache` is set.

        Raises TypeError without a function that takes what it is called with, and RuntimeError where the model runs its
        head more or less than once.
        """
        function = _checked(function, inputs)

        def fused(hidden: Tensor, head: nn.Linear) -> T:
            return function(hidden, head.weight, bias=head.bias, **self.transform._asdict())

        with _head_computes(self.model, fused) as results:
            self.model(**inputs, use_cache=False)
        if len(results) != 1:
            raise RuntimeError(
                f"{_name(self.model)} ran its LM head {len(results)} times in one forward; expected once"
            )
        return results[0]


def measure_logit_transform(model: nn.Module) -> LogitTransform:
    """Scale and soft-cap between the head and the logits, read off what the model's forward makes of known values.

    Measured rather than read from the config, because configs disagree on names and on meaning: `logits_scaling` divides in
    Granite and multiplies in others. Each known value stands in one row, for every id of the vocabulary: what depends on
    the id shows as well.
    """
    probes = torch.tensor(PROBES, dtype=torch.float64)
    head = _find_head(model)
    shape = len(PROBES), head.weight.shape[0]

    def pretend(hidden: Tensor, _: nn.Linear) -> Tensor:
        if not hidden.isfinite().all():
            raise ValueError(_not_finite(model))
        return probes.to(hidden.device)[:, None, None].expand(*hidden.shape[:-1], shape[1]).clone()

    with torch.no_grad(), _head_computes(model, pretend, replace_logits=True):
        ids = torch.zeros(len(PROBES), 1, dtype=torch.long, device=head.weight.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
    if logits.shape != shape:
        raise ValueError(
            f"{_name(model)} makes logits of shape {list(logits.shape)} of {list(shape)} that its head gives; it cannot be "
            f"fused"
        )
    seen = logits.double().cpu()
    usual = seen.nanmedian(-1).values  # over the ids: one that is treated apart does not count
    scale = float(usual[4] / probes[4])
    softcap = float(usual[-1]) if usual[-1] < 0.5 * scale * probes[-1] else None
    if softcap is not None:
        scale *= 1.0 + (scale * PROBES[4] / softcap) ** 2 / 3  # tanh(x) ≈ x (1 − x²/3) at the probe near 0
    known = probes * scale if softcap is None else softcap * torch.tanh(probes * scale / softcap)
    rtol = max(1e-3, 2 * torch.finfo(logits.dtype).eps)
    if not (scale > 0 and torch.allclose(usual, known, rtol=rtol)):
        raise ValueError(
            f"{_name(model)} does something to its logits that is neither a scale nor a soft-cap "
            f"({PROBES[5]} becomes {float(usual[5]):.4g}, {PROBES[7]} becomes {float(usual[7]):.4g}) and cannot be fused"
        )
    odd = (~torch.isclose(seen, known[:, None], rtol=rtol)).T.nonzero()  # [n, 2] id, row
    if len(odd):
        token, row = odd[0].tolist()
        raise ValueError(
            f"{_name(model)} treats {len(odd[:, 0].unique())} ids of its vocabulary apart after the head: the logit of id "
            f"{token} becomes {float(seen[row, token]):.4g} where {float(known[row]):.4g} was expected; a model whose "
            f"logits depend on the id (masked ids, a bias) cannot be fused"
        )
    return LogitTransform(*(None if v is None else float(f"{v:.7g}") for v in (scale, softcap)))  # type: ignore[arg-type]


@contextlib.contextmanager
def _head_computes(
    model: nn.Module, function: Callable[[Tensor, nn.Linear], T], replace_logits: bool = False
) -> Iterator[list[T]]:
    """While open, the head's forward calls `function(hidden, head)` and collects what it returns.

    The model goes on with empty logits [..., 0], or with the result itself where `replace_logits` is set.
    """
    head = _find_head(model)
    results: list[T] = []

    def forward(hidden: Tensor) -> Any:
        results.append(function(hidden, head))
        return results[-1] if replace_logits else hidden.new_empty(*hidden.shape[:-1], 0)

    own = head.__dict__.get("forward")
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield results
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


def _find_head(model: nn.Module) -> nn.Linear:
    """The module that turns hidden states into logits; a copy that peft trains in full (`modules_to_save`) included."""
    _check_model(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise TypeError(
            f"{_name(model)} has no LM head; give the model with its head, as AutoModelForCausalLM.from_pretrained loads it"
        )
    if hasattr(head, "modules_to_save"):
        on = head.active_adapters and not head.disable_adapters
        head = head.modules_to_save[head.active_adapters[0]] if on else head.original_module
    if hasattr(head, "base_layer"):  # a tuner layer of peft
        raise TypeError(
            f"the LM head of {_name(model)} has an adapter on it (peft's {type(head).__name__}) and cannot be fused; leave "
            f"it out of target_modules (your own code may train it in full, by peft's modules_to_save)"
        )
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or not head.weight.is_floating_point():
        raise TypeError(
            f"the LM head of {_name(model)} is {type(head).__name__} of {type(head).__module__}, not a plain linear layer, "
            f"and cannot be fused; leave it out of quantisation"
        )
    return head


def _check_model(model: Any) -> None:
    """A sentence for what is no causal LM of Transformers."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"FusedCausalLM takes a model, not {type(model).__name__}; load one with AutoModelForCausalLM.from_pretrained"
        )
    if isinstance(model, FusedCausalLM):
        raise TypeError("the model is a FusedCausalLM already; call it, or fuse its .model")
    if hasattr(model, "get_output_embeddings"):
        return
    name = _name(model)
    if isinstance(getattr(model, "module", None), nn.Module):
        raise TypeError(f"{name} wraps the model; fuse first, then wrap: {name}(FusedCausalLM(model))")
    raise TypeError(
        f"{name} is no causal LM of Transformers (it has no get_output_embeddings); call a loss of fastkl.loss with its "
        f"hidden states and its head's weight"
    )


def _checked(function: Callable[..., T] | None, inputs: dict[str, Any]) -> Callable[..., T]:
    """The function, if it takes what it is called with; what is called like the model itself is refused."""
    if function is None or not callable(function):
        raise TypeError(
            f"FusedCausalLM is called with a function first, and got {type(function).__name__}: write fused(lambda hidden, "
            f"weight, **head: …, input_ids=ids), where the function returns a loss; for logits call the model itself"
        )
    if "labels" in inputs:
        raise TypeError(
            "labels are for a model that makes its own loss out of logits; give them to your function's loss"
        )
    if not torch.compiler.is_compiling():
        _check_signature(function)
    return function


def _check_signature(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in ones have none
        return
    try:
        signature.bind(None, None, bias=None, **dict.fromkeys(LogitTransform._fields))
    except TypeError as error:
        raise TypeError(
            f"FusedCausalLM calls its function with hidden, weight, bias=, logit_scale= and softcap=, and yours takes "
            f"{signature} ({error}): let it take (hidden, weight, **head), and pass **head on to the loss"
        ) from None


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the model's first parameter that has a value that is not finite."""
    return next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)


def _not_finite(model: nn.Module) -> str:
    found = first_not_finite(model)
    cause = "though its weights are" if found is None else f"and neither is its weight {found}: the weights are damaged"
    return f"the hidden states of {_name(model)} are not finite for one token, {cause}"


def _name(model: nn.Module) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return type(base).__name__
