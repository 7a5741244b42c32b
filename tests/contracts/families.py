"""A tiny random model of every family in the table: adding a family is one more entry here.

Windows are of 7 and chunks of 8 tokens, and scales that start at some position start at 8, so that all of them bind.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.contracts.models import VOCAB, Pair, pair_of, perturb

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 7,
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    # Experts go by many names.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 0},
    # Multi-head latent attention, and indexers: with few heads many of an indexer's scores would tie at zero.
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_topk": 6, "index_head_dim": 16, "index_n_heads": 16},
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "eod_token_id", "sep_token_id")),
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
MLA = {"num_key_value_heads": 4}
FULL = {"sliding_window": None}
DENSE = {"num_experts": None}

FAMILY_MODELS: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "num_dense_layers": 1},
    "aria_text": {},
    "axk1": MLA,
    "axk2": {**MLA, "gated_norm_rank": 4},
    "beam": ALTERNATING,
    "cohere2_moe": {**ALTERNATING, "prefix_dense_sliding_window_pattern": 1, "logit_scale": 0.5},
    "dbrx": {
        **{"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": {**MLA, "topk_method": "greedy"},
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "dots1": {**ALTERNATING, "max_window_layers": 2},
    "dots3_note_text": {
        **MLA,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "shared_experts_intermediate_size": 16,
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "ernie4_5_moe": {},
    "exaone_moe": ALTERNATING,
    "flex_olmo": {},
    "flint": ALTERNATING,
    "gemma4_text": {
        **ALTERNATING,
        **{"enable_moe_block": True, "top_k_experts": 2},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "final_logit_softcapping": 3.0},
    },
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "gpt_oss": ALTERNATING,
    "granitemoe": {"attention_multiplier": 0.35, "logits_scaling": 2.0},
    "granitemoe_swa": {**ALTERNATING, "attention_multiplier": 0.35, "logits_scaling": 2.0},
    "granitemoehybrid": {
        **{"layer_types": ["attention"] * 4, "position_embedding_type": "rope", "mamba_n_heads": 8},
        **{"attention_multiplier": 0.35, "logits_scaling": 2.0},
    },
    "granitemoeshared": {"attention_multiplier": 0.35, "logits_scaling": 2.0},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": MLA,
    "inkling_text": {
        **{"layer_types": ["hybrid", "hybrid_sliding"] * 2, "mlp_layer_types": ["dense"] + ["sparse"] * 3},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 7},
        **{"d_rel": 4, "rel_extent": 12, "log_scaling_n_floor": 8, "logits_mup_width_multiplier": 2.0},
    },
    "jetmoe": {"kv_channels": 8, "num_hidden_layers": 3},
    "kolibri1": ALTERNATING,
    "laguna": {**ALTERNATING, "mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {
        **{"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1},
        **{"attention_chunk_size": 8, "no_rope_layer_interval": 2, "floor_scale": 8, "attn_scale": 0.5},
    },
    "longcat_flash": {
        **{"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, **MLA},
    },
    "mellum": ALTERNATING,
    "mimo_v2_flash": {**ALTERNATING, "head_dim": 12},
    "minimax_m2": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "mistral4": MLA,
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {**ALTERNATING, "use_sliding_window": True},
    "qwen3_moe": {"use_sliding_window": True},
    "solar_open": {},
    "zaya": {
        **{"layer_types": ["hybrid", "hybrid_sliding"] * 2, "num_experts_per_tok": 1, "router_hidden_size": 16},
    },
    # Dense models
    "arcee": {},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**ALTERNATING, "logit_scale": 0.5},
    "ernie4_5": {},
    "exaone4": ALTERNATING,
    "gemma": {},
    "gemma2": {**ALTERNATING, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**ALTERNATING, "final_logit_softcapping": 3.0},
    "glm": {"eos_token_id": 2},
    "glm4": {"eos_token_id": 2},
    "granite": {"attention_multiplier": 0.35, "logits_scaling": 2.0},
    "hunyuan_v1_dense": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama": {},
    "ministral": ALTERNATING,
    "mistral": {},
    "nemotron": {},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "phi3": {},
    "qwen2": {**ALTERNATING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**ALTERNATING, "use_sliding_window": True, "max_window_layers": 1},
    "seed_oss": {},
    "smollm3": {**ALTERNATING, "use_sliding_window": True},
    "stablelm": {},
    "starcoder2": {},
}


INSTALLED = [name for name in FAMILY_MODELS if name in CONFIG_MAPPING]
"""those that the installed transformers has"""


def config_class(model_type: str) -> Any:
    """The configuration class of a family; skips the test where the installed transformers has none yet."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return CONFIG_MAPPING[model_type]


def make_family_model(model_type: str) -> Any:
    """A float32 model of a family with random weights in which every part matters."""
    torch.manual_seed(0)
    kind = config_class(model_type)
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    # Where there are names enough, a class takes only its own: strange ones would be kept and mean nothing.
    settings = {**COMMON, **FAMILY_MODELS[model_type]}
    taken = {name: value for name, value in settings.items() if name in known or name in FAMILY_MODELS[model_type]}
    config = kind(**taken)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # of a model for images and text, whose text model transformers lists nowhere
        model = transformers.models.mistral4.modeling_mistral4.Mistral4ForCausalLM(config)
    return perturb(model.eval(), 0.15)


@cache
def family_pair(model_type: str) -> Pair:
    """The untouched model beside one behind layouts, made once in a session: tests leave both as they are."""
    return pair_of(model_type, make_family_model(model_type))


VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"image_size": 28, "patch_size": 14},
}
COMPOSITE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "aria": ("aria_text", {"vision_config": {**VISION, "model_type": "idefics3_vision"}}),
    "gemma3": ("gemma3_text", {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "gemma4": (
        "gemma4_text",
        {"vision_config": {**VISION, "num_key_value_heads": 4, "head_dim": 8}, "audio_config": None},
    ),
    "llama4": (
        "llama4_text",
        {
            "vision_config": {
                **VISION,
                **{"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
                "pixel_shuffle_ratio": 0.5,
            }
        },
    ),
    "mistral3": ("mistral4", {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8}}),
}
"""models of text and images: their text model's family, and the rest"""


def make_composite_model(model_type: str) -> Any:
    """A tiny model of text and images, its text model as in `make_family_model`."""
    inner, rest = COMPOSITE_MODELS[model_type]
    text_config = {**make_family_model(inner).config.to_dict(), "pad_token_id": 0}
    if model_type == "gemma3":  # whose composite class leaves it out
        text_config["final_logit_softcapping"] = None
    torch.manual_seed(0)
    config = config_class(model_type)(text_config=text_config, **rest)
    return perturb(AutoModelForImageTextToText.from_config(config).eval(), 0.15)


@cache
def composite_pair(model_type: str) -> Pair:
    """As `family_pair`."""
    return pair_of(model_type, make_composite_model(model_type))
