"""Counts from headers agree with transformers' own models, whatever a family calls its experts."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.checkpoint.sparse import meta_shapes, one_by_one, write_sparse
from tests.contracts.families import ALTERNATING, COMMON, FAMILY_MODELS, MLA, config_class
from zconvert.checkpoint.anatomy import _SIGMOID, _SOFTMAX
from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.headers import Headers, TensorInfo, read_headers
from zconvert.checkpoint.parameters import count_parameters
from zconvert.checkpoint.source import resolve
from zconvert.tidar.families import FAMILIES

RECURRENT = {"layer_types": ["linear_attention", "full_attention"] * 2}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
REFUSED_MODELS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**RECURRENT, **MLA},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4, "sliding_window": None},
    "inkling2_text": {**FAMILY_MODELS["inkling_text"], "moe_intermediate_size": 48, "n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "deepseek_v4": {
        **{"num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 8},
        **{"hc_mult": 2, "hc_sinkhorn_iters": 3, "index_topk": 2, "partial_rotary_factor": 0.5},
    },
    "kimi_linear": {**RECURRENT, **MLA},
    "minimax": RECURRENT,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention", "moe"]},
    "qwen3_next": {**RECURRENT, **DELTA},
    "qwen3_5_moe_text": {**RECURRENT, **DELTA},
}
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ROUTER = re.compile(r"router|\.gate\.|expert_bias|e_score_correction_bias|balancing_biases|moe_statics")
"""what grows with the number of experts and is read for every token"""
MOE = [*(name for name in FAMILY_MODELS if not FAMILIES[name].dense), *REFUSED_MODELS]

QWEN3_30B: dict[str, Any] = {
    **{"vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32},
    **{"num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128},
    **{"num_experts_per_tok": 8, "tie_word_embeddings": False},
}


def tiny_model(model_type: str, experts: int, device: str) -> Any:
    """A family's model with that many experts."""
    own = copy.deepcopy({**FAMILY_MODELS, **REFUSED_MODELS}[model_type])
    if "ffn_config" in own:
        own["ffn_config"]["moe_num_experts"] = experts
    kind = config_class(model_type)
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    settings = {**COMMON, **own, **dict.fromkeys(EXPERT_KEYS, experts)}
    config = kind(**{name: value for name, value in settings.items() if name in known or name in own})
    with torch.device(device):
        try:
            return AutoModelForCausalLM.from_config(config)
        except ValueError:
            return transformers.models.mistral4.modeling_mistral4.Mistral4ForCausalLM(config)


def sizes_of(model: Any) -> dict[str, int]:
    """Items of all that a checkpoint of the model holds; tied weights once."""
    stored = {*model.state_dict()} - {*(getattr(model, "all_tied_weights_keys", None) or {})}
    return {name: tensor.numel() for name, tensor in model.state_dict().items() if name in stored}


@pytest.mark.parametrize("model_type", MOE)
def test_active_parameters_are_those_of_a_model_with_no_more_experts_than_a_token_uses(
    model_type: str, tmp_path: Path
) -> None:
    few, more = (16, 36) if model_type == "doge" else (4, 6)  # Doge wants squares
    model = tiny_model(model_type, few, "cpu")
    small, large = sizes_of(model), sizes_of(tiny_model(model_type, more, "meta"))
    grown = {name: (large[name] - size) for name, size in small.items() if not ROUTER.search(name)}
    an_expert = sum(grown.values()) // (more - few)
    assert an_expert > 0
    total = sum(small.values())
    never_read = 0
    if model_type == "longcat_flash":  # in memory its two zero experts have weights too, which are never read
        never_read = sum(model.get_parameter(name)[few:].numel() for name in small if name.endswith("gate_up_proj"))
    model.save_pretrained(tmp_path / model_type)

    document = describe(resolve(tmp_path / model_type))
    per_token = document["experts"]["per_token"]
    assert per_token == (4 if model_type == "doge" else FAMILY_MODELS.get(model_type, {}).get("num_experts_per_tok", 2))
    assert document["kind"] == "mixture_of_experts"
    assert document["experts"]["num"] == few
    assert document["parameters"]["total"] == total
    assert document["parameters"]["active"] == total - (few - per_token) * an_expert - never_read
    outer = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings().weight
    outer += [] if head is outer[0] else [head]
    without = document["parameters"]["active"] - sum(weight.numel() for weight in outer)
    assert document["parameters"]["active_without_embeddings"] == without


@pytest.mark.parametrize("model_type", [name for name in FAMILY_MODELS if FAMILIES[name].dense])
def test_dense_models_are_called_dense_and_all_of_them_is_active(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, 4, "cpu")
    model.save_pretrained(tmp_path / model_type)
    document = describe(resolve(tmp_path / model_type))
    assert (document["kind"], document["experts"], document["router"]) == ("dense", None, None)
    assert document["family"] == model_type
    assert document["parameters"]["total"] == document["parameters"]["active"] == sum(sizes_of(model).values())


@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("stacked", [True, False])
def test_qwen3_30b_a3b_has_30_53_billion_parameters_and_3_35_active(tmp_path: Path, shards: int, stacked: bool) -> None:
    shapes, config = meta_shapes("qwen3_moe", **QWEN3_30B)
    named = shapes if stacked else dict(one_by_one(shapes))
    document = describe(resolve(write_sparse(tmp_path / "qwen", named, config, shards=shards)))
    assert in_billions(document) == (30.53, 3.35, 2.73)
    assert document["experts"] == {"num": 128, "per_token": 8, "shared": 0, "moe_layers": 48, "dense_layers": 0}
    assert len(document["shards"]) == shards
    assert sum(shard["bytes"] for shard in document["shards"]) > 61 * 10**9


def test_zaya1_8b_has_8_84_billion_parameters_and_1_29_active(tmp_path: Path) -> None:
    shapes, config = meta_shapes("zaya")
    document = describe(resolve(write_sparse(tmp_path / "zaya", shapes, config, shards=4)))
    assert in_billions(document) == (8.84, 1.29, 0.75)
    assert [entry["kind"] for entry in document["cache"]] == ["full_kv", "cca_state"]


def in_billions(document: dict[str, Any]) -> tuple[float, ...]:
    return tuple(round(count / 1e9, 2) for count in document["parameters"].values())


def test_layers_for_multi_token_prediction_are_stored_but_not_active(tmp_path: Path) -> None:
    folder = tmp_path / "deepseek"
    tiny_model("deepseek_v3", 4, "cpu").save_pretrained(folder)
    headers, config = read_headers(folder), json.loads((folder / "config.json").read_text())
    whole = count_parameters(headers, config)
    # The last layer becomes the one that predicts ahead, which published checkpoints number on.
    counts = count_parameters(headers, {**config, "num_hidden_layers": 3})
    last = sum(t.items for t in headers.tensors.values() if t.name.startswith("model.layers.3."))
    routed = sum(t.items for t in headers.tensors.values() if t.name.startswith("model.layers.3.mlp.experts."))
    assert counts["total"] == whole["total"]
    assert (whole["active"] or 0) - (counts["active"] or 0) == last - routed // 2
    named = {
        f"mtp.{name}": TensorInfo(f"mtp.{name}", "F32", (8, 8), "x", 0, 0) for name in ("fc.weight", "norm.weight")
    }
    assert count_parameters(Headers(headers.tensors | named, ()), config)["active"] == whole["active"]


def test_layers_of_an_image_tower_are_no_layers_that_predict_ahead() -> None:
    shapes = {
        "model.language_model.embed_tokens.weight": (8, 4),
        "model.language_model.layers.0.mlp.down_proj.weight": (4, 4),
        "model.vision_tower.encoder.layers.9.mlp.fc1.weight": (4, 4),
    }
    tensors = {name: TensorInfo(name, "F32", shape, "x", 0, 0) for name, shape in shapes.items()}
    counts = count_parameters(Headers(tensors, ()), {"text_config": {"num_hidden_layers": 1}})
    assert counts["active"] == counts["total"] == 64


def test_every_router_in_the_family_table_has_a_known_scoring() -> None:
    moe = {name for name, family in FAMILIES.items() if not family.dense}
    assert moe - {"cohere2_moe"} <= _SIGMOID | _SOFTMAX  # Cohere's config says it
    assert not _SIGMOID & _SOFTMAX


def test_a_config_of_a_composite_model_tells_its_text_models_experts(tmp_path: Path) -> None:
    folder = tmp_path / "composite"
    tiny_model("llama4_text", 4, "cpu").save_pretrained(folder)
    path = folder / "config.json"
    plain = describe(resolve(folder))
    path.write_text(json.dumps({"model_type": "llama4", "text_config": json.loads(path.read_text())}))
    composite = describe(resolve(folder))
    assert composite["verdict"] == "refused"
    for key in ("parameters", "experts", "router", "attention", "cache", "layers", "kind", "rope", "context_length"):
        assert composite[key] == plain[key]


def test_alternating_layers_have_two_caches(tmp_path: Path) -> None:
    assert ALTERNATING["layer_types"].count("sliding_attention") == 2
    tiny_model("gpt_oss", 4, "cpu").save_pretrained(tmp_path / "gpt")
    document = describe(resolve(tmp_path / "gpt"))
    assert document["cache"] == [
        {"kind": "sliding_kv", "layers": 2, "window": 7, "width": 2 * 2 * 8},
        {"kind": "full_kv", "layers": 2, "window": None, "width": 2 * 2 * 8},
    ]
    assert document["attention"]["sinks"] is True


def test_latent_attention_keeps_the_latent_and_the_rotary_part(tmp_path: Path) -> None:
    tiny_model("deepseek_v3", 4, "cpu").save_pretrained(tmp_path / "deepseek")
    document = describe(resolve(tmp_path / "deepseek"))
    assert document["attention"]["kind"] == "mla"
    assert document["cache"] == [{"kind": "mla_latent", "layers": 4, "window": None, "width": 16 + 8}]
    router = {"scoring": "sigmoid", "groups": 1, "groups_per_token": 1, "aux_loss": None, "scaling": 2.5}
    assert document["router"] == {**router, "balancing_bias": True}
    assert document["experts"]["dense_layers"] == 1
    assert document["experts"]["shared"] == 1
