"""What of a model text runs through. A composite model (text and images, say) has parts that it never reaches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkl.trainer.errors import ConfigError, brief

PROBE_TOKENS = 256  # layers that compress what is far away see nothing of a shorter text


class TextPath(NamedTuple):
    """Measured by a forward pass in training mode."""

    layers: frozenset[str]  # names of the modules that were called and gave one tensor; of linear ones, as they should
    parameters: frozenset[int]  # ids of the parameters that get a gradient


def text_path(model: PreTrainedModel, context: int | None) -> TextPath:
    """Runs a short text through the model, where it is; random states, weights and mode stay as they are.

    Raises:
        ConfigError: If the model does not take text alone.
    """
    layers: set[str] = set()

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor) and (not isinstance(module, nn.Linear) or _is_plain(module, inputs, output)):
            layers.add(name)

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    training = model.training
    ids = torch.zeros(1, min(PROBE_TOKENS, context or PROBE_TOKENS), dtype=torch.long, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            output: Any = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return TextPath(frozenset(layers), frozenset(map(id, _leaves(output.logits))))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise ConfigError(
            f"{type(model).__name__} does not read text alone ({brief(error)}); take another model"
        ) from error
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def assumed_path(model: PreTrainedModel) -> TextPath:
    """Without a forward pass, for a model without weights: the decoder and the head."""
    reached = {id(module) for part in (model.get_decoder(), model.get_output_embeddings()) for module in part.modules()}
    parts = {name: module for name, module in model.named_modules() if id(module) in reached}
    own = (parameter for module in parts.values() for parameter in module.parameters(recurse=False))
    return TextPath(frozenset(parts), frozenset(map(id, own)))


def freeze_unreached(model: PreTrainedModel, path: TextPath) -> list[str]:
    """Freezes what text does not reach; returns its names, those of whole modules where nothing in them is reached.

    DDP would wait for gradients that never come. An expert is left as it is where others of its list are reached: the few
    tokens of the measurement were not for it.
    """
    frozen = []
    for name, part in _unreached(model, "", path.parameters):
        frozen.append(name)
        part.requires_grad_(False)
    return frozen


def _is_plain(layer: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> bool:
    """Whether a layer of a linear class multiplied all of its input with all of its weight."""
    return bool(inputs) and output.shape == (*inputs[0].shape[:-1], layer.out_features)


def _unreached(
    module: nn.Module, prefix: str, reached: frozenset[int]
) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """The topmost ones, with their names."""
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in reached:
            yield prefix + name, parameter
    shares = {name: _share(child, reached) for name, child in module.named_children()}
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    for name, child in module.named_children():
        if shares[name] == 0.0:
            siblings = (other for other in module.children() if listed and type(other) is type(child))
            if not any(_share(other, reached) for other in siblings):
                yield prefix + name, child
        elif shares[name] not in (None, 1.0):
            yield from _unreached(child, f"{prefix}{name}.", reached)


def _share(module: nn.Module, reached: frozenset[int]) -> float | None:
    """Of the module's parameters, how many are reached; None without parameters."""
    parameters = list(module.parameters())
    return sum(id(parameter) in reached for parameter in parameters) / len(parameters) if parameters else None


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """The parameters from which a result was computed, by autograd's graph: no backward pass, no memory for gradients."""
    seen, nodes = set(), [result.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]
