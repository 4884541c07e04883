"""Loading students and teachers: ordinary Transformers models and tokenizers, from a folder or the Hub."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastkl import head
from fastkl.trainer.config.models import ModelConfig, StudentConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.adapters import adapted
from fastkl.trainer.models.pretrained import load_model, load_tokenizer, outline, read_config
from fastkl.trainer.models.sizes.layers import most_positions
from fastkl.trainer.models.text_path import TextPath, assumed_path, freeze_unreached, text_path
from fastkl.trainer.models.withheld import keep_weights
from fastkl.trainer.notes import note


def load_teacher_tokenizer(config: TeacherConfig) -> PreTrainedTokenizerBase | None:
    """That of the model, or the one named beside a server; None where only the server knows."""
    path = config.tokenizer_path
    return load_tokenizer(dataclasses.replace(config, path=path)) if path else None


def teacher_device(config: TeacherConfig, default: torch.device, name: str = "teacher") -> torch.device:
    """Where a teacher is loaded; a ConfigError if this machine has no such device. `name` is what messages call it."""
    if config.device is None:
        return default
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{name}.device is {config.device!r}, which cannot be used here ({' '.join(str(error).split())}); this "
            f"machine has cpu and {torch.accelerator.device_count()} accelerators, null means where the student is"
        ) from error
    return device


def load_teacher(config: TeacherConfig, device: torch.device, name: str = "teacher") -> PreTrainedModel:
    """A model that never gets a gradient."""
    quantized = _quantized(config, device, name)
    note(f"loading the {name} {config.path}")
    model = load_model(config, **quantized).requires_grad_(False)
    return model if quantized else model.to(device)


def vocab_size(config: ModelConfig) -> int:
    """The ids of a model's head are those below this one; it may be padded beyond its tokenizer."""
    size: int = read_config(config).get_text_config().vocab_size
    return size


def _quantized(config: TeacherConfig, device: torch.device, name: str) -> dict[str, Any]:
    """Options that load a quantised model, as the folder holds it or as asked for; none for a plain one."""
    stored = _stored_quantization(config)
    placed = {"device_map": {"": device}}  # a quantised model cannot be moved
    if config.quantization is None:
        return {} if stored is None else placed
    if stored is not None:
        raise ConfigError(
            f"{name}.quantization is {config.quantization}, but the weights in {config.path!r} are quantised already "
            f"({stored}); unset it"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{name}.quantization is {config.quantization}, which needs the package bitsandbytes: pip install "
            f"bitsandbytes, or unset it"
        )
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": getattr(torch, config.dtype)}
    chosen = four if config.quantization == "4bit" else {"load_in_8bit": True}
    return {**placed, "quantization_config": BitsAndBytesConfig(**chosen)}


def _stored_quantization(config: ModelConfig) -> Any:
    return getattr(read_config(config), "quantization_config", None)


def load_student(config: StudentConfig, device: torch.device) -> PreTrainedModel:
    """The model to train, on its device, in eval mode: all of it that text reaches, or a LoRA adapter on that."""
    stored = _stored_quantization(config)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise ConfigError(
            f"student.path is {config.path!r}, whose weights are quantised ({method}) and cannot be trained; take the "
            f"model that was quantised"
        )
    note(f"loading the student {config.path}")
    model = load_model(config).to(device)
    keep_weights(model)
    return _as_student(model, config, text_path(model, context_length(model)))


def outline_of_student(config: StudentConfig) -> PreTrainedModel:
    """The same on the meta device, without weights: its layers, sizes and dtypes."""
    model = outline(config)
    return _as_student(model, config, assumed_path(model))


def _as_student(model: PreTrainedModel, config: StudentConfig, path: TextPath) -> PreTrainedModel:
    freeze_unreached(model, path)
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    if config.lora.rank == 0:
        return model
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    return adapted(model, config.lora, path).eval()


def _checkpoint_activations(model: PreTrainedModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its newer name
    try:
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"student.gradient_checkpointing is true, which {type(model).__name__} does not support; set it to false and "
            f"lower batch.max_tokens"
        ) from error


def fuse(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """`fastkl.head.fuse`; a head that cannot be fused is a ConfigError naming the model's part in the run."""
    try:
        return head.fuse(model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


def context_length(model: PreTrainedModel) -> int | None:
    return most_positions(model.config.get_text_config())
