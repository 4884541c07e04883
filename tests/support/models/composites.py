"""Tiny composite models: a language model beside a part that text does not reach."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
}
IMAGES |= {"patch_size": 14, "projection_dim": 32}
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
QWEN_IMAGES = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
ROTARY = {"mrope_section": [1, 1, 2], "rope_type": "default"}
# Composite models: what of them is frozen.
COMPOSITES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gemma3": (
        {"text_config": TEXT, "vision_config": IMAGES, "mm_tokens_per_image": 1, "image_token_index": 60},
        ["model.vision_tower", "model.multi_modal_projector"],
    ),
    "qwen3_vl": (
        {
            "text_config": {**TEXT, "rope_scaling": ROTARY},
            "vision_config": {**QWEN_IMAGES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **TOKENS,
        },
        ["model.visual"],
    ),
    "qwen2_5_vl": (
        {
            "text_config": {**TEXT, "rope_scaling": {**ROTARY, "type": "mrope"}},
            "vision_config": {**QWEN_IMAGES, "fullatt_block_indexes": [1]},
            **TOKENS,
        },
        ["model.visual"],
    ),
    "mistral3": (
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {**IMAGES, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 60,
        },
        ["model.vision_tower", "model.multi_modal_projector"],
    ),
    "llava": (
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**IMAGES, "model_type": "clip_vision_model"},
            "image_token_index": 60,
        },
        ["model.vision_tower", "model.multi_modal_projector"],
    ),
}


def composite(kind: str, **text: object) -> Any:
    torch.manual_seed(0)
    settings = COMPOSITES[kind][0]
    config = AutoConfig.for_model(kind, **{**settings, "text_config": {**settings["text_config"], **text}})
    return AutoModelForMultimodalLM.from_config(config).eval()
