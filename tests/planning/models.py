"""Published models by the sizes in their config.json."""

from __future__ import annotations

from typing import Any

from tests.checkpoint.test_parameters import QWEN3_30B
from zconvert.planning.model import ModelFacts, facts_from_config

__all__ = ["QWEN3_30B"]

DEEPSEEK_V3 = {
    **{"vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048},
    **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1},
    **{"n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "kv_lora_rank": 512},
    **{"q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
}
MIXTRAL = {
    **{"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
}
OLMOE = {
    **{"vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
}
GPT_OSS_20B = {
    **{"vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32},
    **{"num_experts_per_tok": 4, "attention_bias": True},
}
ZAYA_8B = {
    **{"vocab_size": 262_272, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "head_dim": 128, "moe_intermediate_size": 2048, "num_experts": 16},
    **{"router_hidden_size": 256, "layer_types": ["hybrid"] * 40},
}
QWEN2_57B = {
    **{"vocab_size": 151_936, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28},
    **{"num_key_value_heads": 4, "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20_480},
    **{"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 18_944},
}
QWEN25_1_5B = {
    **{"vocab_size": 151_936, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12},
    **{"num_key_value_heads": 2, "intermediate_size": 8960, "tie_word_embeddings": True},
}
QWEN3_8B = {
    **{"vocab_size": 151_936, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12_288, "tie_word_embeddings": False},
}


def facts(model_type: str, config: dict[str, Any]) -> ModelFacts:
    """Facts of a model by its config."""
    return facts_from_config({"model_type": model_type, **config}, model_type)
