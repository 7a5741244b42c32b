"""How a model is built, as far as its `config.json` tells: layers, experts, router, attention, cache, positions.

Families name the same thing differently, and transformers 4 wrote other keys than 5. Every function takes the language
model's configuration (`language_config`) and returns None where nothing is said.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

_SIGMOID = frozenset(
    (
        *("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text"),
        *("exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "hy_v4", "inkling_text"),
        *("kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4_text", "mimo_v2_flash", "minimax_m2"),
        *("minimax_m3_vl_text", "nemotron_h", "solar_open"),
    )
)
"""families whose routers score by a sigmoid, with or without a word of it in config.json"""
_SOFTMAX = frozenset(
    (
        *("aria_text", "dbrx", "deepseek_v2", "doge", "ernie4_5_moe", "flex_olmo", "gemma4_text", "gpt_oss", "zaya"),
        *("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "jamba", "jetmoe"),
        *("longcat_flash", "mellum", "minimax", "mistral4", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
        *("qwen3_5_moe_text", "qwen3_next"),
    )
)
"""the same for softmax"""

_EVERY_NTH_FULL = {"gemma2": 2, "gpt_oss": 2, "cohere2": 4, "cohere2_moe": 4, "gemma3_text": 6}
"""which layers see everything where a config of transformers 4 has a window and no layer types"""
_CACHES = {
    "full_attention": "full_kv",
    "attention": "full_kv",
    "sliding_attention": "sliding_kv",
    "chunked_attention": "chunked_kv",
    "indexed_attention": "full_kv",
    "hybrid": "full_kv",
    "hybrid_sliding": "sliding_kv",
    "conv": "conv_state",
    "compressed_sparse_attention": "compressed_kv",
    "heavily_compressed_attention": "compressed_kv",
    "minimax_m3_sparse": "full_kv",
    "linear_attention": "recurrent_state",
    "mamba": "recurrent_state",
}
_TOO_MANY = 2**40
"""of anything: products of some such numbers are still numbers that a float can hold"""
_MOST_LAYERS = 10_000
_WITHOUT_CACHE = ("moe", "mlp")  # Nemotron-H counts these as layers of their own


def layers_of(config: dict[str, Any]) -> int | None:
    """How many layers there are."""
    blocks = config.get("layers_block_type")
    named = len(blocks) if isinstance(blocks, list) and blocks else None
    layers = whole(config, "num_hidden_layers", "num_layers", "n_layers", "n_layer") or named
    return None if layers is None or layers > _MOST_LAYERS else layers


def layer_types_of(config: dict[str, Any]) -> dict[str, int] | None:
    """How many layers there are of each type."""
    for key in ("layer_types", "layers_block_type"):
        types = config.get(key)
        if isinstance(types, list) and types:
            return dict(Counter(map(str, types)))
    layers = layers_of(config)
    if layers is None or any(key.startswith(("mamba_", "linear_")) or key == "attn_type_list" for key in config):
        return None
    if config.get("model_type") == "zaya":
        return {"hybrid": layers}
    if whole(config, "index_topk"):
        return {"indexed_attention": layers}
    if whole(config, "attention_chunk_size"):  # Llama 4: its layers without rotary embedding see everything
        rotary, every = config.get("no_rope_layers"), whole(config, "no_rope_layer_interval") or 4
        full = sum(not each for each in rotary) if isinstance(rotary, list) and rotary else layers // every
        return _without_zeros({"chunked_attention": layers - full, "full_attention": full})
    if not window_of(config):
        return {"full_attention": layers}
    pattern = whole(config, "sliding_window_pattern") or _EVERY_NTH_FULL.get(str(config.get("model_type")))
    full = layers // pattern if pattern else 0
    if config.get("use_sliding_window") is True and (below := whole(config, "max_window_layers")) is not None:
        full = min(layers, below)  # Qwen 2: the lower layers see everything
    return _without_zeros({"sliding_attention": layers - full, "full_attention": full})


def window_of(config: dict[str, Any]) -> int | None:
    """Tokens that a layer with a sliding window sees."""
    # Qwen's configs carry a window and a switch that turns it off.
    if config.get("use_sliding_window") is False:
        return None
    return whole(config, "sliding_window", "sliding_window_size")


def experts_of(config: dict[str, Any]) -> dict[str, int | None] | None:
    """Routed experts a layer (`num`), how many a token passes through (`per_token`), and `shared` ones beside them."""
    feed_forward = config.get("ffn_config")
    config = {**config, **feed_forward} if isinstance(feed_forward, dict) else config
    num = whole(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if not num or config.get("enable_moe_block") is False or config.get("is_moe") is False:
        return None
    keys = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
    per_token = whole(config, *keys)
    if per_token is None and config.get("model_type") == "zaya":
        per_token = 1  # the only number it knows; its first configs leave it out
    shared = whole(config, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
    if shared is None and whole(config, "shared_expert_intermediate_size", "shared_intermediate_size"):
        shared = 1
    return {"num": num, "per_token": per_token, "shared": shared}


def router_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """How experts are chosen; None for a dense model."""
    if experts_of(config) is None:
        return None
    feed_forward = config.get("ffn_config")
    config = {**feed_forward, **config} if isinstance(feed_forward, dict) else config
    said = next((config[key] for key in ("scoring_func", "score_func", "expert_selection_fn") if config.get(key)), None)
    model_type = str(config.get("model_type"))
    known = "sigmoid" if model_type in _SIGMOID else "softmax" if model_type in _SOFTMAX else None
    return {
        "scoring": str(said) if said else known,
        "groups": whole(config, "n_group", "num_expert_group"),
        "groups_per_token": whole(config, "topk_group"),
        "aux_loss": _number(config, "router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha", "moe_loss_weight"),
        "scaling": _number(config, "routed_scaling_factor", "moe_routed_scaling_factor", "router_scaling_factor"),
    }


def attention_of(config: dict[str, Any]) -> dict[str, Any]:
    """Heads and their width, how keys and values are made, and how far a layer sees."""
    inner = config.get("attn_config")
    config = {**inner, **config} if isinstance(inner, dict) else config
    heads = whole(config, "num_attention_heads", "n_heads", "n_head")
    key_values = whole(config, "num_key_value_heads", "kv_n_heads") or heads
    width, head_dim = whole(config, "hidden_size", "d_model", "n_embd"), whole(config, "head_dim")
    if head_dim is None and heads and width:
        head_dim = width // heads
    if whole(config, "kv_lora_rank"):
        kind = "mla"
        parts = [whole(config, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
        head_dim = sum(part for part in parts if part) if all(parts) else head_dim
    elif whole(config, "cca_time0") or config.get("model_type") == "zaya":
        kind = "cca"
    elif heads is None or key_values is None:
        kind = None
    else:
        kind = "mha" if key_values == heads else "mqa" if key_values == 1 else "gqa"
    return {
        "kind": kind,
        "heads": heads,
        "kv_heads": key_values,
        "head_dim": head_dim,
        "sliding_window": window_of(config),
        "chunk": whole(config, "attention_chunk_size"),
        "indexer_top_k": whole(config, "index_topk"),
    }


def cache_of(config: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What decoding keeps, one entry for each kind.

    Returns:
        for each `kind`: `layers` that have it, `window` (tokens kept; null where all are) and `width`, the values kept
        for each token and layer; for the states, which do not grow, the values of a layer.
    """
    types, attention = layer_types_of(config), attention_of(config)
    if types is None:
        return None
    width = _cache_width(config, attention)
    windows = {"sliding_kv": attention["sliding_window"], "chunked_kv": attention["chunk"]}
    entries: dict[str, dict[str, Any]] = {}

    def add(kind: str, layers: int, window: int | None, width: int | None) -> None:
        entry = entries.setdefault(kind, {"kind": kind, "layers": 0, "window": window, "width": width})
        entry["layers"] += layers

    for name, layers in types.items():
        if name in _WITHOUT_CACHE:
            continue
        kind = _CACHES.get(name, name)
        if attention["kind"] == "mla" and kind == "full_kv":
            kind = "mla_latent"
        add(kind, layers, windows.get(kind), None if kind.endswith("_state") else width)
        if name.startswith("hybrid"):
            # ZAYA's convolutions over queries and keys and its delayed values; Inkling's short convolutions
            if attention["kind"] == "cca":
                add("cca_state", layers, None, _cca_width(config, attention))
            else:
                add("conv_state", layers, None, None)
    return list(entries.values())


def context_of(config: dict[str, Any]) -> int | None:
    """Positions the model was made for, tokens."""
    return whole(config, "max_position_embeddings", "max_seq_len", "n_positions", "model_max_length", "seq_length")


def rope_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """Parameters of the rotary embedding, by layer type where they are given so."""
    if isinstance(config.get("rope_parameters"), dict):
        return config["rope_parameters"]
    inner = config.get("attn_config")
    theta = config.get("rope_theta", inner.get("rope_theta") if isinstance(inner, dict) else None)
    if theta is None:
        return None
    scaling = config.get("rope_scaling")  # transformers 4 kept the two apart
    partial = {key: config[key] for key in ("partial_rotary_factor",) if key in config}
    return {"rope_theta": theta, **partial, **(scaling if isinstance(scaling, dict) else {"rope_type": "default"})}


def _cache_width(config: dict[str, Any], attention: dict[str, Any]) -> int | None:
    if attention["kind"] == "mla":
        return (whole(config, "kv_lora_rank") or 0) + (whole(config, "qk_rope_head_dim") or 0)
    heads, head_dim = attention["kv_heads"], attention["head_dim"]
    return heads * (head_dim + (whole(config, "v_head_dim") or head_dim)) if heads and head_dim else None


def _cca_width(config: dict[str, Any], attention: dict[str, Any]) -> int | None:
    heads, key_values, head_dim = attention["heads"], attention["kv_heads"], attention["head_dim"]
    if not heads or not key_values or not head_dim:
        return None
    tokens = sum((whole(config, key) or 2) - 1 for key in ("cca_time0", "cca_time1"))
    return tokens * (heads + key_values) * head_dim + key_values * head_dim // 2


def whole(config: dict[str, Any], *keys: str) -> int | None:
    """The first of these keys that holds a count, or a list of one count for all layers (Hunyuan)."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if type(value) is int and 0 <= value < _TOO_MANY:
            return value
    return None


def _number(config: dict[str, Any], *keys: str) -> float | None:
    numbers = (config[key] for key in keys if type(config.get(key)) in (int, float))
    return next((number for number in numbers if abs(number) < _TOO_MANY), None)  # nor NaN


def _without_zeros(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
