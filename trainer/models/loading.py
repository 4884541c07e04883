"""Loading students and teachers: ordinary Transformers models and tokenizers, from a folder or the Hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastkl.head import FusedCausalLM
from fastkl.trainer.config.models import ModelConfig, StudentConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.adapters import adapted
from fastkl.trainer.models.withheld import keep_weights, withhold


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    path = _check_path(config, "config.json", "tokenizer_config.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer could be loaded from {config.path!r}, neither a folder here nor on the Hub: {error}"
        ) from error
    return tokenizer


def load_teacher_tokenizer(config: TeacherConfig) -> PreTrainedTokenizerBase | None:
    """That of the model, or the one named beside a server; None where only the server knows."""
    path = config.path or config.tokenizer
    return load_tokenizer(dataclasses.replace(config, path=path)) if path else None


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model in its dtype, in eval mode, on the CPU."""
    return _load_model(config)


def teacher_device(config: TeacherConfig, default: torch.device) -> torch.device:
    """Where a teacher is loaded; a ConfigError if this machine has no such device."""
    if config.device is None:
        return default
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"teacher.device is {config.device!r}, which cannot be used here ({' '.join(str(error).split())}); this "
            f"machine has cpu and {torch.accelerator.device_count()} accelerators, null means where the student is"
        ) from error
    return device


def load_teacher(config: TeacherConfig, device: torch.device) -> PreTrainedModel:
    """A model that never gets a gradient."""
    quantized = _quantized(config, device)
    model = _load_model(config, **quantized).requires_grad_(False)
    return model if quantized else model.to(device)


def _load_model(config: ModelConfig, **more: Any) -> PreTrainedModel:
    path = _check_path(config, "config.json")
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "trust_remote_code": config.trust_remote_code,
        **more,
    }
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    try:
        model: PreTrainedModel = _auto_class(config).from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"no model could be loaded from {config.path!r}: {error}") from error
    withhold(model)
    return model.eval()


def vocab_size(config: ModelConfig) -> int:
    """The ids of a model's head are those below this one; it may be padded beyond its tokenizer."""
    size: int = _load_config(config).get_text_config().vocab_size
    return size


def _load_config(config: ModelConfig) -> PretrainedConfig:
    path = _check_path(config, "config.json")
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model could be loaded from {config.path!r}: {error}") from error
    return found


def _quantized(config: TeacherConfig, device: torch.device) -> dict[str, Any]:
    """Options that load a quantised model, as the folder holds it or as asked for; none for a plain one."""
    found = _load_config(config)
    placed = {"device_map": {"": device}}  # a quantised model cannot be moved
    stored = getattr(found, "quantization_config", None)
    if config.quantization is None:
        return {} if stored is None else placed
    if stored is not None:
        raise ConfigError(
            f"teacher.quantization is {config.quantization}, but the weights in {config.path!r} are quantised already "
            f"({stored}); unset it"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"teacher.quantization is {config.quantization}, which needs the package bitsandbytes: pip install "
            f"bitsandbytes, or unset it"
        )
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": getattr(torch, config.dtype)}
    chosen = four if config.quantization == "4bit" else {"load_in_8bit": True}
    return {**placed, "quantization_config": BitsAndBytesConfig(**chosen)}


def load_student(config: StudentConfig) -> PreTrainedModel:
    """The model to train, in eval mode: all of it, or a LoRA adapter on it."""
    model = load_model(config)
    keep_weights(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora.rank == 0:
        return model
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    return adapted(model, config.lora).eval()


def fuse(model: PreTrainedModel, name: str) -> FusedCausalLM:
    """The model with a fused head; a head that cannot be fused is a ConfigError naming the model's part in the run."""
    try:
        return FusedCausalLM(model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


def context_length(model: PreTrainedModel) -> int | None:
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def _auto_class(config: ModelConfig) -> Any:
    if not config.liger:
        return AutoModelForCausalLM
    if not torch.cuda.is_available():
        raise ConfigError("liger is true, but Liger's kernels need a CUDA device; set it to false")
    from liger_kernel.transformers import AutoLigerKernelForCausalLM

    return AutoLigerKernelForCausalLM


def _check_path(config: ModelConfig, *files: str) -> str:
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
