"""Model folders and Hub ids, read by Transformers; whatever is wrong with one is a ConfigError of one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastkl.trainer.config.models import ModelConfig
from fastkl.trainer.errors import ConfigError, brief
from fastkl.trainer.models.ends import check_declared_ends
from fastkl.trainer.models.sizes.layers import most_positions
from fastkl.trainer.models.withheld import withhold
from fastkl.trainer.notes import note

T = TypeVar("T")

CUT_SHORT = "PytorchStreamReader"  # torch's reader of .bin files, on one that ends too early
NAMED = 3  # of the weights that are missing


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    path = _checked_path(config, "config.json", "tokenizer_config.json")
    try:
        return _read(config, "tokenizer", lambda: AutoTokenizer.from_pretrained(path, **_trust(config)))
    except ConfigError:
        if Path(path, "config.json").is_file():
            read_config(config)  # a tokenizer is read with the model's config: is that what is wrong?
        raise


def read_config(config: ModelConfig) -> Any:
    """The model's own config."""
    path = _checked_path(config, "config.json")
    return _read(config, "model", lambda: AutoConfig.from_pretrained(path, **_trust(config)))


def positions(config: ModelConfig) -> int | None:
    """How many tokens a text may have, by the model's own config; None where nothing limits it."""
    return most_positions(read_config(config).get_text_config())


def load_model(config: ModelConfig, **placed: Any) -> PreTrainedModel:
    """The model in its dtype, in eval mode; on the CPU, if `placed` does not put it elsewhere.

    Raises:
        ConfigError: Also for weights that the files do not hold, or in another shape: Transformers would make random ones.
    """
    path, kind = _checked_path(config, "config.json"), _auto_class(config)
    check_declared_ends(path, read_config(config).get_text_config().vocab_size)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), **_trust(config), **placed}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are named below
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    model, found = _read(config, "model", lambda: kind.from_pretrained(path, **options))
    lost = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if lost:
        named = ", ".join(lost[:NAMED]) + ", …" * (len(lost) > NAMED)
        raise ConfigError(
            f"no model could be loaded from {config.path!r}: its files lack {len(lost)} weights of {type(model).__name__} "
            f"or have them in another shape ({named}); download or save it again"
        )
    _check_unused(config, model, sorted(found["unexpected_keys"]))
    withhold(model)
    return model.eval()


def _check_unused(config: ModelConfig, model: PreTrainedModel, unused: list[str]) -> None:
    """No weights in the files are of the model's own layers, yet without a place by its config.

    Others, such as a value head, are left out. What the class declares to ignore is not among `unused`.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    extra = int(
        getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    )  # they follow the others
    modules = dict(model.named_modules())
    own = [name for name in unused if _is_bias(modules, name) or _is_layer_beyond(modules, name, extra)]
    if own:
        named = ", ".join(own[:NAMED]) + ", …" * (len(own) > NAMED)
        raise ConfigError(
            f"{config.path!r} holds {len(own)} weights that {type(model).__name__} has no place for by its config.json "
            f"({named}); correct the config's layers or biases, or save the model again"
        )
    if unused:
        named = ", ".join(unused[:NAMED]) + ", …" * (len(unused) > NAMED)
        note(f"{len(unused)} weights in {config.path} are not the language model's and are left out ({named})")


def _is_bias(modules: dict[str, Any], name: str) -> bool:
    """Of a layer that the model has, with a weight."""
    parent, _, own = name.rpartition(".")
    return own == "bias" and parent in modules and "weight" in modules[parent]._parameters


def _is_layer_beyond(modules: dict[str, Any], name: str, extra: int) -> bool:
    """Of a layer after the last one of a list in the model, and after `extra` more."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        layers = modules.get(".".join(parts[:place]))
        if part.isdigit() and isinstance(layers, nn.ModuleList):
            return int(part) >= len(layers) + extra
    return False


def outline(config: ModelConfig) -> PreTrainedModel:
    """The model without its weights, on the meta device, in eval mode: its layers, sizes and dtypes."""
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), **_trust(config)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    found, kind = read_config(config), _auto_class(config)
    with torch.device("meta"):
        model: PreTrainedModel = _read(config, "model", lambda: kind.from_config(found, **options))
    withhold(model)
    return model.eval()


def _read(config: ModelConfig, what: str, read: Callable[[], T]) -> T:
    """Other people's code on other people's files: anything may be raised."""
    try:
        return read()
    except Exception as error:
        where = "" if os.path.isdir(os.path.expanduser(config.path)) else ", neither a folder here nor on the Hub"
        if "trust_remote_code=True" in str(error):
            raise ConfigError(
                f"no {what} could be loaded from {config.path!r}: it has Python code of its own, which is not run without "
                f"leave. If you trust it, set trust_remote_code to true beside this path (student.trust_remote_code, "
                f"teacher.trust_remote_code or model.trust_remote_code)"
            ) from error
        told = isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and not (
            isinstance(error, JSONDecodeError) or CUT_SHORT in str(error) or getattr(error, "errno", None) is not None
        )
        remedy = "" if told else ". Is every file of it whole?"
        raise ConfigError(f"no {what} could be loaded from {config.path!r}{where}: {brief(error)}{remedy}") from error


def _trust(config: ModelConfig) -> dict[str, Any]:
    return {"trust_remote_code": config.trust_remote_code}


def _auto_class(config: ModelConfig) -> Any:
    """What loads the model: a causal LM, or one that reads images or sound as well as text."""
    if config.liger:
        if not torch.cuda.is_available():
            raise ConfigError("liger is true, but Liger's kernels need a CUDA device; set it to false")
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        return AutoLigerKernelForCausalLM
    found = read_config(config)
    if "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {}):
        return AutoModelForCausalLM
    if type(found) in MODEL_FOR_CAUSAL_LM_MAPPING:
        own: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(found)]
        if own.config_class in MODEL_FOR_CAUSAL_LM_MAPPING:  # otherwise none of these would load what is saved
            return AutoModelForCausalLM
    if type(found) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    raise ConfigError(
        f"no model could be loaded from {config.path!r}: {found.model_type} is no causal language model of Transformers; "
        f"take one that is"
    )


def _checked_path(config: ModelConfig, *files: str) -> str:
    """The folder or Hub id, `~` expanded; what looks like a folder must be one of a model, with one of the files."""
    path = os.path.expanduser(config.path)
    looks_local = path.startswith((".", "/")) or path.count("/") > 1 or os.path.exists(path)
    if looks_local and not any(Path(path, file).is_file() for file in files):
        if Path(path, "config.yaml").is_file():
            raise ConfigError(
                f"model path {config.path!r} is a run's folder; its trained model is {Path(path, 'student')}"
            )
        raise ConfigError(f"model path {config.path!r} is not a model folder (no {files[0]} in {Path(path).resolve()})")
    return path
