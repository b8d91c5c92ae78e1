"""Published dims of dLLMs, as Hugging Face configs that transformers builds without remote code.

Sources: the models' config files on the Hugging Face hub (GSAI-ML/LLaDA-8B-Base, Dream-org/Dream-v0-Base-7B,
inclusionAI/LLaDA-MoE-7B-A1B-Base, inclusionAI/LLaDA2.0-mini, JetLM/SDAR-8B-Chat).  LLaDA is Llama, Dream is Qwen2 and
LLaDA-MoE close to OLMoE, each bidirectional; LLaDA2.0 is close to GLM-4 with experts and SDAR is Qwen3, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

KNOWN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "LLaDA-8B": {
            "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
            "num_key_value_heads": 32, "intermediate_size": 12288, "vocab_size": 126464, "rope_theta": 500000.0,
            "mask_token_id": 126336, "max_position_embeddings": 4096,
        },
        "Dream-7B": {
            "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
            "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "rope_theta": 1000000.0,
            "mask_token_id": 151666, "max_position_embeddings": 131072,
        },
        "LLaDA-MoE-7B-A1B": {
            "model_type": "olmoe", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16,
            "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
            "vocab_size": 157184, "rope_theta": 50000.0, "mask_token_id": 156895, "max_position_embeddings": 8192,
        },
        "LLaDA2.0-mini": {
            "model_type": "glm4_moe", "num_hidden_layers": 20, "hidden_size": 2048, "num_attention_heads": 16,
            "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5120, "moe_intermediate_size": 512,
            "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "use_qk_norm": True,
            "partial_rotary_factor": 0.5, "vocab_size": 157184, "rope_theta": 600000.0, "mask_token_id": 156895,
            "max_position_embeddings": 32768, "block_causal": 32,
        },
        "SDAR-8B": {
            "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
            "rope_theta": 1000000.0, "mask_token_id": 151669, "max_position_embeddings": 32768, "block_causal": 4,
        },
    }
)  # fmt: skip
"""Configs by the names that the command line takes."""
