"""LoRA adapters (peft): which layers they go on, and the base that has them merged in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkl.trainer.config.models import LoraConfig
from fastkl.trainer.errors import ConfigError


def adapted(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    """The model with a LoRA adapter; its own weights are frozen.

    Raises:
        ConfigError: If lora.target_modules names a layer whose weight is another's too.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    tied = _tied(model)
    adapter = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.target_modules, task_type="CAUSAL_LM"
    )
    result: Any = get_peft_model(model, adapter)
    for name in _adapted_layers(result.get_base_model()):
        if name in tied:
            raise ConfigError(
                f"student.lora.target_modules is {config.target_modules} and adapts {name}, whose weight is also that of "
                f"{tied[name]}: merged into the saved student, the adapter would change both. Leave {name} out"
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


def _adapted_layers(base: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name in layers if not name.endswith(".base_layer")]


def _tied(model: nn.Module) -> dict[str, str]:
    """The modules whose parameter is another module's too, with that one's name."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter.data_ptr()].append(name.rpartition(".")[0])
    return {name: other for names in owners.values() for name in names for other in names if other != name}
