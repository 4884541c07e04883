"""What a model's config switches on that no forward pass here may do; the saved config has it all the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

ROUTERS = "output_router_logits"


def withhold(model: Any) -> None:
    """Switches off the routers' logits of a model that was just loaded.

    They are for an auxiliary loss that the model computes itself, of masks that do not fit while it generates.
    """
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        if getattr(config, ROUTERS, False):
            setattr(config, ROUTERS, False)
            model._withheld = [*getattr(model, "_withheld", []), config]


def withholds_routers(model: Any) -> bool:
    """Whether the config of a model, or of the one inside a PEFT model, asks for the routers' auxiliary loss."""
    return bool(getattr(model, "_withheld", []))


@contextmanager
def as_loaded(model: Any) -> Iterator[None]:
    """While open, the config says what it said in the folder that the model comes from."""
    configs = getattr(model, "_withheld", [])
    for config in configs:
        setattr(config, ROUTERS, True)
    try:
        yield
    finally:
        for config in configs:
            setattr(config, ROUTERS, False)


def keep_weights(model: nn.Module) -> None:
    """Keeps RWKV from dividing its weights in eval mode, for float16's range: as they are they are trained and saved."""
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):
            config: Any = copy.copy(module.config)
            config.rescale_every = 0
            module.config = config  # its own: the model's, which is saved, stays as it is
