"""LoRA adapters (peft): which layers they go on, and the base that has them merged in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastkl.trainer.config.models import LoraConfig
from fastkl.trainer.errors import ConfigError, brief
from fastkl.trainer.models.text_path import TextPath

ALL_LINEAR = "all-linear"
UNREACHED = "text does not reach it"
NO_PLAIN_LAYER = (
    "the model does not use it as a plain layer: it gives more than one tensor, or a kernel reads its weight"
)

EXPERTS = ("gate_proj", "up_proj", "down_proj")
TOGETHER = "; of stacked experts, gate_proj, up_proj and down_proj are named together"


def adapted(model: PreTrainedModel, config: LoraConfig, path: TextPath) -> PreTrainedModel:
    """The model with a LoRA adapter; its own weights are frozen.

    `all-linear` leaves out what cannot be adapted. A name leaves out what text does not reach.

    Raises:
        ConfigError: If lora.target_modules names no layer, or one that cannot be adapted.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    unfit, linear = dict(_unfit(model, path)), _linear(model)
    everywhere = config.target_modules == ALL_LINEAR
    names = [name for name, _ in model.named_modules()]
    if not everywhere:
        fit = [name for name in [*linear, *_embeddings(model)] if name not in unfit]
        _check_fit(config.target_modules, names if isinstance(config.target_modules, list) else fit or names, unfit)
    aside = [name for name in linear if name in unfit and (everywhere or unfit[name] == UNREACHED)]
    adapter = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules if everywhere else _narrowed(config.target_modules, fit),
        exclude_modules=aside or None,
        task_type="CAUSAL_LM",
    )
    result: Any = None
    try:
        result = get_peft_model(model, adapter)
    except (ValueError, TypeError, NotImplementedError) as error:
        if everywhere or _unknown(adapter.target_modules, names) is None:
            raise ConfigError(f"student.lora.target_modules is {config.target_modules}: {brief(error)}") from error
    unknown = None if everywhere else _unknown(adapter.target_modules, names)
    if unknown is not None:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear if name not in unfit}))
        raise ConfigError(
            f"student.lora.target_modules has {unknown!r}, which names no layer of {type(model).__name__}; give "
            f"{ALL_LINEAR}, or some of {known}{TOGETHER if unknown in EXPERTS else ''}"
        )
    return result


@contextmanager
def merged(model: Any) -> Iterator[PreTrainedModel]:
    """The base of a PEFT model with the adapter's changes in its weights; afterwards, but for rounding, as it was."""
    model.merge_adapter()
    try:
        yield model.get_base_model()
    finally:
        model.unmerge_adapter()


def merged_state(base: PreTrainedModel) -> dict[str, Tensor]:
    """The state of a base with merged layers, under the names from before peft wrapped them, once or several times."""
    return {
        re.sub(r"(\.base_layer)+\.", ".", name): tensor
        for name, tensor in base.state_dict().items()
        if ".lora_" not in name
    }


def _check_fit(targets: str | list[str], names: list[str], unfit: dict[str, str]) -> None:
    """No target is a layer that cannot be adapted, unless text does not reach it and does reach others that are meant."""
    for target in _listed(targets):
        try:
            meant = [name for name in names if _matches(targets, target, name)]
        except re.error as error:
            raise ConfigError(
                f"student.lora.target_modules is {target!r}, neither {ALL_LINEAR} nor a regular expression ({error})"
            ) from error
        for name in [name for name in meant if unfit.get(name) != UNREACHED] or meant:
            if name in unfit:
                raise ConfigError(f"student.lora.target_modules adapts {name}, but {unfit[name]}. Leave it out")


def _narrowed(targets: str | list[str], fit: list[str]) -> str | list[str]:
    """An expression that matches whole blocks too means the layers in them that can be adapted."""
    meant = [name for name in fit if isinstance(targets, str) and re.fullmatch(targets, name)]
    return "|".join(re.escape(name) for name in meant) or targets


def _unknown(targets: Any, names: list[str]) -> str | None:
    """A target that is no layer's name. What peft knows under another name, such as experts, it has taken out of them."""
    return next((t for t in _listed(targets) if not any(_matches(targets, t, name) for name in names)), None)


def _listed(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else sorted(targets)


def _matches(targets: Any, target: str, name: str) -> bool:
    """As peft does it: a text is a regular expression for whole names, an entry of a list the end of one."""
    return bool(re.fullmatch(target, name)) if isinstance(targets, str) else f".{name}".endswith(f".{target}")


def _linear(model: PreTrainedModel) -> list[str]:
    """What `all-linear` means to peft: all linear layers but the head."""
    head: Any = model.get_output_embeddings()
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, (nn.Linear, Conv1D)) and module is not head]


def _embeddings(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def _unfit(model: nn.Module, path: TextPath) -> Iterator[tuple[str, str]]:
    """The modules that cannot have an adapter, and why."""
    tied = _tied(model)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if not weight.requires_grad:
            yield name, UNREACHED
        elif name in tied:
            yield (
                name,
                f"its weight is also that of {tied[name]}: merged into the student, the adapter would change both",
            )
        elif _read_by_a_kernel(model, name) or (id(weight) in path.parameters and name not in path.layers):
            yield name, NO_PLAIN_LAYER


def _read_by_a_kernel(model: nn.Module, name: str) -> bool:
    """Mamba's kernels take the weights behind the convolution themselves, on some devices and not on others."""
    parent, _, own = name.rpartition(".")
    return {"A_log", "D"} <= model.get_submodule(parent)._parameters.keys() and own not in ("in_proj", "norm")


def _tied(model: nn.Module) -> dict[str, str]:
    """The modules whose parameter is another module's too, with that one's name."""
    owners: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = (
            parameter.untyped_storage()._cdata,
            int(parameter.storage_offset()),
        )  # a model without weights has it too
        owners[place].append(name.rpartition(".")[0])
    return {name: other for names in owners.values() for name in names for other in names if other != name}
