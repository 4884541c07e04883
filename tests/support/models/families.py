"""Small random models of the causal-LM families that Transformers has: the usual sizes, and one line where those do not do.

A family that a later Transformers brings needs a line here only if the usual sizes do not build it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

Settings = dict[str, Any]

VOCABULARY, CONTEXT, WINDOW = 128, 128, 8
# Names that some families have and others do not.
USUAL: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    "sliding_window": WINDOW,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # older names
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "n_positions": CONTEXT,
    "ffn_dim": 48,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
}
LATENT: Settings = {"num_key_value_heads": 4}  # latent attention has as many keys as queries
MAMBA: Settings = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
MIXED: Settings = {"layer_types": ["linear_attention", "full_attention"]}
HYBRID: Settings = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
SLIDING: Settings = {"layer_types": ["sliding_attention", "full_attention"]}
SECTIONS: Settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
INDEXED: Settings = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
ABSENT: Any = object()  # a usual name that the family refuses

# What differs from the usual sizes, by family.
SETTINGS: dict[str, Settings] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**MIXED, **LATENT},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {**SLIDING, "logit_scale": 1.0},
    "cohere2_moe": {**SLIDING, "logit_scale": 1.0},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": LATENT,
    "dots3_note_text": LATENT,
    "exaone4": SLIDING,
    "falcon": {"head_dim": ABSENT},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gemma4_text": {**SLIDING, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "gemma3n_text": {
        **SLIDING,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
    },
    "glm4_moe_lite": LATENT,
    "glm4v_text": SECTIONS,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_oss": SLIDING,
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8},
    "kimi_linear": {**MIXED, **LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "minicpm3": {**LATENT, "dim_model_base": 32, "scale_emb": 1.0},
    "minimax": MIXED,
    "moshi": {"sliding_window": CONTEXT},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8},
    "olmo3": SLIDING,
    "olmo_hybrid": MIXED,
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "qwen3_5_moe_text": MIXED,
    "qwen3_5_text": MIXED,
    "qwen3_next": MIXED,
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], **INDEXED},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlnet": {"max_position_embeddings": ABSENT},
    "xlstm": {"v_head_dim": ABSENT},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {**LATENT, "pad_token_id": None},  # it loads a padding row as zeros
    "zamba": {**HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2},
    "zamba2": {
        **HYBRID,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}

VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "depth": 1,
    "patch_size": 4,
    "image_size": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "projection_dim": 32,
}
# Models of text and images, by the family of their text part, with what differs in their vision part.
COMPOSITES: dict[str, tuple[str, Settings]] = {
    "cohere_compass": ("cohere_compass_text", {}),
    "fuyu": ("persimmon", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma4": ("gemma4_text", {}),
    "glm4v": ("glm4v_text", {}),
    "got_ocr2": ("qwen2", {}),
    "idefics3": ("llama", {}),
    "internvl": ("qwen2", {}),
    "llama4": ("llama4_text", {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}),
    "llava": ("llama", {}),
    "mistral3": ("mistral", {}),
    "mllama": ("mllama_text_model", {}),
    "paligemma": ("gemma", {}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {}),
    "qwen2_vl": ("qwen2_vl_text", {"embed_dim": 16, "hidden_size": 32}),
    "qwen3_5": ("qwen3_5_text", {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {}),
    "qwen3_vl": ("qwen3_vl_text", {}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", {}),
    "smolvlm": ("llama", {}),
}


def settings(family: str) -> Settings:
    """The config's settings: the usual ones that the family has, and its own."""
    default, own = AutoConfig.for_model(family), SETTINGS.get(family, {})
    found = {name: value for name, value in USUAL.items() if _has(default, name)} | own
    return {name: copy.deepcopy(value) for name, value in found.items() if value is not ABSENT}


def _has(config: Any, name: str) -> bool:
    try:
        found = getattr(config, name, ABSENT)
    except Exception:  # it has one for each layer
        return True
    unused = name == "sliding_window" and found is None  # inherited, and the cache alone would heed it
    return found is not ABSENT and not unused


def make_config(family: str, **more: Any) -> Any:
    if family not in COMPOSITES:
        return AutoConfig.for_model(family, **settings(family) | more)
    text, vision = COMPOSITES[family]
    parts = {"text_config": settings(text) | {"model_type": text}, "vision_config": VISION | vision}
    return AutoConfig.for_model(family, **parts | more)


def make_model(family: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A random model in float32, with weights large enough that its distributions are far from flat."""
    config = make_config(family, **more)
    whole = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING  # not its text part alone
    kind: Any = AutoModelForMultimodalLM if whole else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind.from_config(copy.deepcopy(config)).parameters())
    if size > 5e6:
        raise ValueError(f"{family} has {size:,} weights with the sizes of SETTINGS; make it smaller")
    torch.manual_seed(seed)
    model: PreTrainedModel = kind.from_config(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.3)
            else:
                for weight in module.parameters(recurse=False):
                    if _is_matrix(module, weight):
                        weight.normal_(0, 1.3 * min(weight.shape[-2:]) ** -0.5)
    return model.eval()


def _is_matrix(module: nn.Module, weight: Tensor) -> bool:
    """A product's matrix, or a stack of experts' matrices; not a convolution or a state's decay."""
    if weight.dim() == 2:
        return isinstance(module, nn.Linear | Conv1D) or not weight.any()  # a router of zeros would choose at random
    return weight.dim() == 3 and min(weight.shape) >= 4
