"""Models that do something of their own: with dropout, with the mask, with positions, or with a state."""

from __future__ import annotations

from typing import Any

from tiny_models import causal_lm

from fastkl.trainer.models.withheld import keep_weights, withhold

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ODD: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 128, "num_key_value_heads": 4},  # dropout by its class's default
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4},  # the same; positions from the mask
    "granite": {"attention_dropout": 0.2},  # of a function
    "phimoe": {**EXPERTS, "input_jitter_noise": 0.1},  # noise before the experts
    "mixtral": {**EXPERTS, "router_jitter_noise": 0.1},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "output_router_logits": True},
    "bloom": {"attention": "eager"},  # its own mask, from the attention mask
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gptj": {"attention": "eager", "rotary_dim": 8, "n_positions": 128},
    "openai-gpt": {"attention": "eager", "n_positions": 128},
    "gpt_oss": {"attention": "eager", **EXPERTS, "head_dim": 16, "sliding_window": 8},
    "deepseek_v3": {  # keys wider than values
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "rwkv": {"attention": "eager", "attention_hidden_size": 64, "context_length": 128},  # no mask at all
    "minimax": {**EXPERTS, "head_dim": 16, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
}


def odd_model(kind: str, **settings: Any) -> Any:
    """As the trainer loads a student: in eval mode, with the weights that it trains."""
    values = {**ODD.get(kind, {}), **settings}
    model = causal_lm(kind, values.pop("attention", "sdpa"), **values)
    withhold(model)
    keep_weights(model)
    return model.eval()
