"""Shapes of a model's tensors from `config.json` alone, for families built in the common way.

A checkpoint's headers say the same exactly; this is for those that are not even downloaded. One row of `_BUILDS` says
how a family differs from the plain decoder: embedding, layers of attention and MLP (dense or experts), norm, head.
Names and shapes are those of transformers' model in memory, without buffers that are not saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zconvert.checkpoint.anatomy import attention_of, experts_of, layers_of, whole
from zconvert.errors import UserError
from zconvert.tidar.families import language_config

Shapes = dict[str, tuple[int, ...]]
_Named = Iterator[tuple[str, tuple[int, ...]]]

_TWO = ("input_layernorm", "post_attention_layernorm")
_FOUR = (*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class _Build:
    """How a family differs from the plain decoder."""

    attention: str = "grouped"
    """grouped, latent (MLA), latent with an indexer, or compressed (CCA)"""
    fused_qkv: bool = False
    qkv_bias: bool | str = "attention_bias"
    """biases of the projections to queries, keys and values; a text names the key of the config that says so"""
    out_bias: bool | str = "attention_bias"
    qk_norm: str = ""
    """head: norms over each head's width; full: over all heads together; optional: head where use_qk_norm is true"""
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    out_gate: bool = False
    """a projection as wide as all heads gates what attention gives"""
    sinks: bool = False
    norms: tuple[str, ...] = _TWO
    norm_bias: bool = False
    mlp: str = "gated"
    """of dense layers: gated (three matrices), fused (two, the first twice as wide), or plain (two)"""
    mlp_names: tuple[str, str] = ("up_proj", "down_proj")
    mlp_bias: bool | str = False
    block: str = "mlp"
    """the name of a layer's experts' module"""
    expert_width: tuple[str, ...] = ("moe_intermediate_size",)
    experts_bias: bool = False
    transposed: bool = False
    """experts keep (inputs, outputs)"""
    router: str = "gate.weight"
    router_bias: bool = False
    balancing: str = ""
    """a bias for each expert that is no part of the weights, by name"""
    shared: str = ""
    """shared experts' module"""
    shared_width: tuple[str, ...] = ("moe_intermediate_size",)
    """width of one of them"""
    shared_gate: bool = False
    shared_beside: bool = False
    """a shared MLP stands beside the experts' module (Granite)"""
    inside: tuple[str, ...] = ()
    """norms inside the experts' module"""
    head_bias: bool = False
    tied: bool = False
    """what a config that does not say means"""


_SHARED: dict[str, Any] = {"balancing": "gate.e_score_correction_bias", "shared": "shared_experts"}
_DEEPSEEK = _Build(attention="latent", **_SHARED)
_INDEXED = _Build(attention="indexed", **_SHARED)
_GRANITE: dict[str, Any] = {
    "block": "block_sparse_moe",
    "router": "router.weight",
    "expert_width": ("intermediate_size",),
    "tied": True,
}
_WIDE: dict[str, Any] = {"expert_width": ("intermediate_size",)}

_BUILDS: dict[str, _Build] = {
    # Mixtures of experts
    "afmoe": _Build(
        qk_norm="head",
        out_gate=True,
        norms=("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
        router="router.gate.weight",
        balancing="expert_bias",
        shared="shared_experts",
    ),
    "deepseek_v2": _Build(attention="latent", shared="shared_experts"),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": _INDEXED,
    "axk1": _Build(attention="latent", inside=("post_mlp_layernorm",), **_SHARED),
    "glm4_moe_lite": _DEEPSEEK,
    "mistral4": _Build(attention="latent", shared="shared_experts"),
    "dots1": _Build(qk_norm="head", **_SHARED),
    "ernie4_5_moe": _Build(
        qkv_bias="use_bias",
        out_bias="use_bias",
        balancing="gate.moe_statics.e_score_correction_bias",
        shared="shared_experts",
        tied=True,
    ),
    "exaone_moe": _Build(qk_norm="head", qkv_bias=False, out_bias=False, **_SHARED),
    "flex_olmo": _Build(qk_norm="full", norms=("post_attention_layernorm", "post_feedforward_layernorm"), **_WIDE),
    "glm4_moe": _Build(qk_norm="optional", out_bias=False, **_SHARED),
    "gpt_oss": _Build(
        sinks=True,
        experts_bias=True,
        transposed=True,
        router="router.weight",
        router_bias=True,
        **_WIDE,
    ),
    "granitemoe": _Build(**_GRANITE),
    "granitemoeshared": _Build(shared_beside=True, **_GRANITE),
    "hunyuan_v1_moe": _Build(
        qk_norm="head",
        qk_norm_names=("query_layernorm", "key_layernorm"),
        router="gate.wg.weight",
        shared="shared_mlp",
        shared_width=("intermediate_size",),
        **_WIDE,
    ),
    "hy_v3": _Build(
        qk_norm="head", qkv_bias=False, out_bias=False, balancing="e_score_correction_bias", shared="shared_experts"
    ),
    "kolibri1": _Build(qk_norm="head", norms=(*_TWO, "post_self_attn_layernorm", "post_mlp_layernorm"), **_SHARED),
    "llama4_text": _Build(
        block="feed_forward",
        transposed=True,
        router="router.weight",
        shared="shared_expert",
        shared_width=("intermediate_size",),
        **_WIDE,
    ),
    "mellum": _Build(qk_norm="head"),
    "minimax_m2": _Build(qk_norm="full", qkv_bias=False, out_bias=False, balancing="e_score_correction_bias", **_WIDE),
    "mixtral": _Build(qkv_bias=False, out_bias=False, **_WIDE),
    "olmoe": _Build(qk_norm="full", **_WIDE),
    "phimoe": _Build(router="router.weight", norm_bias=True, head_bias=True, **_WIDE),
    "qwen2_moe": _Build(
        qkv_bias=True,
        out_bias=False,
        shared="shared_expert",
        shared_width=("shared_expert_intermediate_size",),
        shared_gate=True,
    ),
    "qwen3_moe": _Build(qk_norm="head"),
    "solar_open": _Build(**_SHARED),
    "zaya": _Build(attention="compressed", tied=True),
    # Dense models
    "arcee": _Build(mlp="plain", mlp_bias="mlp_bias"),
    "cohere": _Build(norms=("input_layernorm",), tied=True),
    "cohere2": _Build(norms=("input_layernorm",), tied=True),
    "ernie4_5": _Build(qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", tied=True),
    "exaone4": _Build(
        qk_norm="head",
        qkv_bias=False,
        out_bias=False,
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gemma": _Build(tied=True),
    "gemma2": _Build(norms=_FOUR, tied=True),
    "gemma3_text": _Build(norms=_FOUR, qk_norm="head", tied=True),
    "glm": _Build(mlp="fused", out_bias=False),
    "glm4": _Build(mlp="fused", out_bias=False, norms=(*_TWO, "post_self_attn_layernorm", "post_mlp_layernorm")),
    "granite": _Build(mlp_bias="mlp_bias", tied=False),
    "hunyuan_v1_dense": _Build(qk_norm="head", qk_norm_names=("query_layernorm", "key_layernorm")),
    "llama": _Build(mlp_bias="mlp_bias"),
    "ministral": _Build(qkv_bias=False, out_bias=False),
    "mistral": _Build(qkv_bias=False, out_bias=False),
    "nemotron": _Build(mlp="plain", norm_bias=True, mlp_bias="mlp_bias"),
    "olmo2": _Build(qk_norm="full", norms=("post_attention_layernorm", "post_feedforward_layernorm")),
    "olmo3": _Build(qk_norm="full", norms=("post_attention_layernorm", "post_feedforward_layernorm")),
    "phi3": _Build(fused_qkv=True, mlp="fused", qkv_bias=False, out_bias=False),
    "qwen2": _Build(qkv_bias=True, out_bias=False),
    "qwen3": _Build(qk_norm="head"),
    "seed_oss": _Build(out_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": _Build(mlp_bias="mlp_bias", tied=True),
    "stablelm": _Build(qkv_bias="use_qkv_bias", out_bias=False, norm_bias=True),
    "starcoder2": _Build(
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp="plain",
        mlp_names=("c_fc", "c_proj"),
        mlp_bias="use_bias",
        norm_bias=True,
        tied=True,
    ),
}
"""families whose shapes follow from their config; tests/planning/test_from_config.py holds each against its model"""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "seed_oss": {"attention_bias": True},
    "gpt_oss": {"attention_bias": True},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "starcoder2": {"use_bias": True},
}
"""keys that a config may leave out, and what transformers takes them to be where that is not nothing"""


def knows(model_type: object) -> bool:
    """Whether shapes of this family can be had from its config."""
    return model_type in _BUILDS


def shapes_from_config(config: dict[str, Any]) -> Shapes:
    """Names and shapes of a model's tensors.

    Args:
        config: contents of `config.json`; of a composite model its text model is taken.

    Raises:
        UserError: the family is built in another way, or a size is missing.
    """
    config = language_config(config)
    model_type = str(config.get("model_type"))
    build = _BUILDS.get(model_type)
    if build is None:
        raise UserError(
            f"parameters of model_type {model_type} cannot be told from config.json alone",
            expected=f"one of {', '.join(sorted(_BUILDS))}",
            fix="give the checkpoint's folder or Hub id: headers are read, weights are not",
        )
    return dict(_model({**_DEFAULTS.get(model_type, {}), **config}, build))


def _model(config: dict[str, Any], build: _Build) -> _Named:
    width, rows = _size(config, "hidden_size"), _size(config, "vocab_size")
    yield "model.embed_tokens.weight", (rows, width)
    if build.attention == "compressed":
        yield "model.input_hidden_states_scale", (width,)
        yield "model.input_hidden_states_bias", (width,)
    layers = layers_of(config)
    if layers is None:
        raise _missing("num_hidden_layers", config.get("num_hidden_layers"))
    for layer in range(layers):
        yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in _layer(config, build, layer, width))
    yield from _norm("model.norm", width, build)
    if not config.get("tie_word_embeddings", build.tied):
        yield "lm_head.weight", (rows, width)
        if build.head_bias and config.get("lm_head_bias"):
            yield "lm_head.bias", (rows,)


def _layer(config: dict[str, Any], build: _Build, layer: int, width: int) -> _Named:
    make = {"grouped": _grouped, "latent": _latent, "indexed": _latent, "compressed": _compressed}[build.attention]
    yield from ((f"self_attn.{name}", shape) for name, shape in make(config, build, width))
    if experts_of(config) is not None and _is_sparse(config, layer):
        yield from ((f"{build.block}.{name}", shape) for name, shape in _experts(config, build, layer, width))
    else:
        dense = "intermediate_size_mlp" if build.block == "feed_forward" else "intermediate_size"
        yield from (
            (f"{build.block}.{name}", shape) for name, shape in _mlp(config, build, width, _size(config, dense))
        )
    if build.shared_beside and (shared := whole(config, "shared_intermediate_size")):
        yield "shared_mlp.input_linear.weight", (2 * shared, width)
        yield "shared_mlp.output_linear.weight", (width, shared)
    for name in build.norms:
        yield from _norm(name, width, build)
    if build.attention == "compressed":
        for scale in ("post_attention_residual_scale", "post_mlp_residual_scale"):
            for part in ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias"):
                yield f"{scale}.{part}", (width,)


def _is_sparse(config: dict[str, Any], layer: int) -> bool:
    """Whether a layer of a mixture of experts has experts; families say it in five ways."""
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return bool(kinds[layer] == "sparse")
    if isinstance(config.get("moe_layers"), list):
        return layer in config["moe_layers"]
    if isinstance(config.get("mlp_only_layers"), list) and layer in config["mlp_only_layers"]:
        return False
    if layer < (whole(config, "first_k_dense_replace", "num_dense_layers") or 0):
        return False
    if layer < (whole(config, "moe_layer_start_index") or 0):
        return False
    step = whole(config, "decoder_sparse_step", "interleave_moe_layer_step") or 1
    return (layer + 1) % step == 0


def _grouped(config: dict[str, Any], build: _Build, width: int) -> _Named:
    heads, key_values, head_dim = _heads(config)
    queries, keys = heads * head_dim, key_values * head_dim
    bias = _switch(config, build.qkv_bias)
    if build.fused_qkv:
        yield from _linear("qkv_proj", width, queries + 2 * keys, bias)
    else:
        yield from _linear("q_proj", width, queries, bias)
        yield from _linear("k_proj", width, keys, bias)
        yield from _linear("v_proj", width, keys, bias)
    yield from _linear("o_proj", queries, width, _switch(config, build.out_bias))
    kind = ("head" if config.get("use_qk_norm") else "") if build.qk_norm == "optional" else build.qk_norm
    if kind:
        for name, full in zip(build.qk_norm_names, (queries, keys), strict=True):
            yield f"{name}.weight", (full if kind == "full" else head_dim,)
    if build.out_gate:
        yield "gate_proj.weight", (queries, width)
    if build.sinks:
        yield "sinks", (heads,)


def _latent(config: dict[str, Any], build: _Build, width: int) -> _Named:
    heads, bias = _size(config, "num_attention_heads"), bool(config.get("attention_bias"))
    rope, nope, value = (_size(config, key) for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    latent, query_latent = _size(config, "kv_lora_rank"), whole(config, "q_lora_rank")
    if query_latent:
        yield from _linear("q_a_proj", width, query_latent, bias)
        yield "q_a_layernorm.weight", (query_latent,)
        yield "q_b_proj.weight", (heads * (nope + rope), query_latent)
    else:
        yield "q_proj.weight", (heads * (nope + rope), width)
    yield from _linear("kv_a_proj_with_mqa", width, latent + rope, bias)
    yield "kv_a_layernorm.weight", (latent,)
    yield "kv_b_proj.weight", (heads * (nope + value), latent)
    yield from _linear("o_proj", heads * value, width, bias)
    if build.attention == "indexed":
        index, index_heads = _size(config, "index_head_dim"), _size(config, "index_n_heads")
        yield "indexer.wq_b.weight", (index * index_heads, query_latent or width)
        yield "indexer.wk.weight", (index, width)
        yield "indexer.k_norm.weight", (index,)
        yield "indexer.k_norm.bias", (index,)
        yield "indexer.weights_proj.weight", (index_heads, width)


def _compressed(config: dict[str, Any], build: _Build, width: int) -> _Named:
    heads, key_values, head_dim = _heads(config)
    queries, keys = heads * head_dim, key_values * head_dim
    bias = bool(config.get("attention_bias"))
    yield from _linear("o_proj", queries, width, bias)
    yield from _linear("qkv_proj.q_proj", width, queries, bias)
    yield from _linear("qkv_proj.k_proj", width, keys, bias)
    yield from _linear("qkv_proj.v_proj_current", width, keys // 2, bias)
    yield from _linear("qkv_proj.v_proj_delayed", width, keys // 2, bias)
    first, second = whole(config, "cca_time0") or 2, whole(config, "cca_time1") or 2
    yield "qkv_proj.conv_qk_depthwise.weight", (queries + keys, 1, first)
    yield "qkv_proj.conv_qk_depthwise.bias", (queries + keys,)
    yield "qkv_proj.conv_qk_grouped.weight", (queries + keys, head_dim, second)
    yield "qkv_proj.conv_qk_grouped.bias", (queries + keys,)
    yield "qk_norm.temp", (key_values,)


def _experts(config: dict[str, Any], build: _Build, layer: int, width: int) -> _Named:
    said = experts_of(config) or {}
    number = said.get("num") or 0
    inner = _size(config, *build.expert_width, *_wider(build.expert_width))
    into, out = (number, 2 * inner, width), (number, width, inner)
    if build.transposed:
        into, out = (number, width, 2 * inner), (number, inner, width)
    yield "experts.gate_up_proj", into
    yield "experts.down_proj", out
    if build.experts_bias:
        yield "experts.gate_up_proj_bias", (number, 2 * inner)
        yield "experts.down_proj_bias", (number, width)
    if build.attention == "compressed":
        yield from _zaya_router(config, number, layer, width)
        return
    yield build.router, (number, width)
    if build.router_bias:
        yield build.router.replace("weight", "bias"), (number,)
    if build.balancing:
        yield build.balancing, (1, number) if "moe_statics" in build.balancing else (number,)
    if build.shared and (shared := _shared_width(config, build, said)):
        yield from ((f"{build.shared}.{name}", shape) for name, shape in _gated(width, shared, False))
        if build.shared_gate:
            yield "shared_expert_gate.weight", (1, width)
    for name in build.inside:
        yield f"{name}.weight", (width,)


def _shared_width(config: dict[str, Any], build: _Build, said: dict[str, Any]) -> int:
    one = _size(config, *build.shared_width, *_wider(build.shared_width))
    return one * (said.get("shared") or 0) if build.shared == "shared_experts" else one


def _zaya_router(config: dict[str, Any], number: int, layer: int, width: int) -> _Named:
    inner = _size(config, "router_hidden_size", "zaya_mlp_expansion")
    if layer:
        yield "gate.router_states_scale", (inner,)
    yield "gate.balancing_biases", (number + 1,)
    yield from _linear("gate.down_proj", width, inner, True)
    yield "gate.router_mlp.norm.weight", (inner,)
    yield from _linear("gate.router_mlp.fc1", inner, inner, True)
    yield from _linear("gate.router_mlp.fc2", inner, inner, True)
    yield "gate.router_mlp.out_proj.weight", (number + 1, inner)


def _mlp(config: dict[str, Any], build: _Build, width: int, inner: int) -> _Named:
    bias = _switch(config, build.mlp_bias)
    if build.mlp == "gated":
        yield from _gated(width, inner, bias)
    elif build.mlp == "fused":
        yield from _linear("gate_up_proj", width, 2 * inner, bias)
        yield from _linear("down_proj", inner, width, bias)
    else:
        yield from _linear(build.mlp_names[0], width, inner, bias)
        yield from _linear(build.mlp_names[1], inner, width, bias)


def _gated(width: int, inner: int, bias: bool) -> _Named:
    yield from _linear("gate_proj", width, inner, bias)
    yield from _linear("up_proj", width, inner, bias)
    yield from _linear("down_proj", inner, width, bias)


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> _Named:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int, build: _Build) -> _Named:
    yield f"{name}.weight", (width,)
    if build.norm_bias:
        yield f"{name}.bias", (width,)


def _switch(config: dict[str, Any], said: bool | str) -> bool:
    return bool(config.get(said)) if isinstance(said, str) else said


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    attention = attention_of(config)
    heads, key_values, head_dim = attention["heads"], attention["kv_heads"], attention["head_dim"]
    if not heads or not key_values or not head_dim:
        raise _missing("num_attention_heads")
    return heads, key_values, head_dim


def _wider(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Where a family's own key is missing, older configs have the experts' width under the MLP's."""
    return () if "intermediate_size" in keys else ("intermediate_size",)


def _size(config: dict[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        value = whole({key: value[0] if isinstance(value, list) and value else value}, key)
        if value:
            return value
    found = next((config[key] for key in keys if key in config), None)
    raise _missing(keys[0], found)


def _missing(key: str, found: object = None) -> UserError:
    return UserError(
        f"config.json does not say {key}",
        found=None if found is None else repr(found),
        expected="a whole number above zero",
        fix="give the checkpoint's folder or Hub id, whose headers say it",
    )
