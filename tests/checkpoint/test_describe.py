"""What `inspect` says of a checkpoint agrees with the model that transformers builds from it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.sparse import write_sparse_file
from tests.checkpoint.tiny import MODEL_TYPES
from zconvert.checkpoint.anatomy import layer_types_of
from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError

KEYS = {
    *("name", "revision", "model_type", "architectures", "verdict", "reason", "layers", "layer_types", "experts"),
    *("attention", "context_length", "rope", "dtypes", "parameters", "vocabulary", "tied_embeddings", "mask_token"),
    *("shards", "tidar", "next", "family", "kind", "router", "cache", "quantisation", "index", "gated_bytes"),
}


def patch(folder: Path, **changes: Any) -> Path:
    """Changes members of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def described(folder: Path) -> dict[str, Any]:
    """Describes a folder; the document must be JSON with the documented keys."""
    document = describe(resolve(folder))
    assert document.keys() == KEYS
    return json.loads(json.dumps(document, allow_nan=False))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_counts_agree_with_the_model_that_transformers_loads(
    tiny_checkpoint: Callable[..., Path], model_type: str, shards: int
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(model_type, shards=shards)
    document = described(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    buffers = sum(b.numel() for name, b in model.named_buffers() if name.endswith("balancing_biases"))
    experts = sum(p.numel() for name, p in parameters.items() if ".experts." in name)
    per_token = model.config.num_experts_per_tok
    assert document["verdict"] == "supported"
    assert document["reason"] is None
    assert document["parameters"]["total"] == total + buffers
    assert document["parameters"]["active"] == total + buffers - experts + experts * per_token // 4
    ends = {
        name: p.numel() for name, p in parameters.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    outer = sum(ends.values())  # a tied head is not among the named parameters
    assert document["parameters"]["active_without_embeddings"] == document["parameters"]["active"] - outer
    assert document["tied_embeddings"] == model.config.tie_word_embeddings
    assert document["layers"] == 2
    assert sum(document["layer_types"].values()) == 2
    experts = {"num": 4, "per_token": per_token, "shared": 0, "moe_layers": 2, "dense_layers": 0}
    assert document["experts"] == experts
    attention = {key: document["attention"][key] for key in ("heads", "kv_heads", "head_dim")}
    assert attention == {"heads": 2, "kv_heads": 1, "head_dim": 16}
    assert (document["family"], document["kind"]) == (model_type, "mixture_of_experts")
    assert document["quantisation"] is None
    no_differences = {"missing": 0, "extra": 0, "examples": [], "missing_shards": []}
    assert document["index"] == (no_differences if shards > 1 else None)
    assert document["context_length"] == 256
    assert document["architectures"] == [type(model).__name__]
    assert document["model_type"] == model_type
    assert sum(kind["bytes"] for kind in document["dtypes"].values()) == sum(
        t.bytes for t in read_headers(folder).tensors.values()
    )
    assert [shard["name"] for shard in document["shards"]] == sorted(p.name for p in folder.glob("*.safetensors"))
    assert sum(shard["bytes"] for shard in document["shards"]) == sum(
        p.stat().st_size for p in folder.glob("*.safetensors")
    )


def test_a_tied_head_that_is_stored_as_well_counts_once(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    untied = described(folder)
    tied = described(patch(folder, tie_word_embeddings=True))
    assert (untied["tied_embeddings"], tied["tied_embeddings"]) == (False, True)
    assert untied["parameters"]["total"] - tied["parameters"]["total"] == 64 * 32
    assert untied["parameters"]["active_without_embeddings"] == tied["parameters"]["active_without_embeddings"]


@pytest.mark.parametrize(
    ("options", "vocabulary", "mask"),
    [
        ({}, {"rows": 64, "tokens": 60, "spare_rows": 4}, {"id": 60, "text": "<mask>", "source": "spare_row"}),
        ({"mask_token": True}, {"rows": 64, "tokens": 60, "spare_rows": 4}, {"id": 4, "source": "existing"}),
        ({"spare_rows": 0}, {"rows": 64, "tokens": 64, "spare_rows": 0}, {"id": 64, "source": "grown"}),
    ],
)
def test_the_mask_token_is_the_one_that_convert_init_would_choose(
    tiny_checkpoint: Callable[..., Path], options: Any, vocabulary: Any, mask: Any
) -> None:
    document = described(tiny_checkpoint("zaya", **options))
    assert document["vocabulary"] == vocabulary
    assert document["mask_token"] == {"text": "<mask>", **mask}


def test_types_of_weights_are_counted_apart(tiny_checkpoint: Callable[..., Path]) -> None:
    dtypes = described(tiny_checkpoint("zaya"))["dtypes"]
    assert list(dtypes) == ["BF16", "F32"]
    assert dtypes["F32"] == {"tensors": 2, "bytes": 2 * 5 * 4}  # the balancing biases
    assert list(described(tiny_checkpoint("zaya", dtype="float32"))["dtypes"]) == ["F32"]


def test_layers_windows_and_rope_are_said_as_config_has_them(tiny_checkpoint: Callable[..., Path]) -> None:
    zaya = described(tiny_checkpoint("zaya"))
    assert zaya["layer_types"] == {"hybrid": 1, "hybrid_sliding": 1}
    assert zaya["attention"]["sliding_window"] == 16
    assert zaya["rope"]["hybrid"]["partial_rotary_factor"] == 0.5
    mixtral = tiny_checkpoint("mixtral")
    assert described(mixtral)["layer_types"] == {"full_attention": 2}
    assert described(patch(mixtral, sliding_window=8))["layer_types"] == {"sliding_attention": 2}
    qwen = described(patch(tiny_checkpoint("qwen3_moe"), sliding_window=8, use_sliding_window=False))
    assert qwen["attention"]["sliding_window"] is None


def test_older_configs_are_read_too(tiny_checkpoint: Callable[..., Path]) -> None:
    old = patch(tiny_checkpoint("mixtral"), rope_parameters=None, rope_theta=1e6, head_dim=None)
    document = described(old)
    assert document["rope"] == {"rope_theta": 1e6, "rope_type": "default"}
    assert document["attention"]["head_dim"] == 16
    scaled = described(patch(old, rope_scaling={"rope_type": "yarn", "factor": 4.0}))
    assert scaled["rope"] == {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}


def test_a_refused_checkpoint_is_described_with_the_reason(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = patch(tiny_checkpoint("mixtral"), model_type="jamba")
    (folder / "tokenizer.json").unlink()
    document = described(folder)
    assert document["verdict"] == "refused"
    assert "Mamba" in document["reason"]
    assert document["parameters"]["total"] > 0
    assert document["vocabulary"] == {"rows": 64, "tokens": None, "spare_rows": None}
    assert (document["mask_token"], document["next"]) == (None, None)


def test_a_config_that_says_next_to_nothing_is_described_with_nulls(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    (folder / "config.json").write_text("{}")
    document = described(folder)
    assert document["verdict"] == "refused"
    assert document["layers"] is document["layer_types"] is document["experts"] is document["rope"] is None
    assert document["parameters"]["active"] is None  # there are experts, and no word on how many act


def test_the_language_model_inside_a_composite_model_is_described(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "some_vl", "text_config": config}))
    document = described(folder)
    assert document["verdict"] == "refused"
    assert (document["experts"]["num"], document["experts"]["per_token"]) == (4, 2)


def test_a_converted_checkpoint_shows_its_settings_and_the_next_command(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("zaya")
    assert described(folder)["next"] == f"zconvert convert-init {folder} --out zaya-tidar-init"
    settings = {"block_size": 4, "mask_token_id": 60, "mask_token": "[M]", "mask_token_source": "spare_row"}
    document = described(patch(folder, tidar=settings))
    assert document["tidar"]["block_size"] == 4
    assert document["mask_token"] == {"id": 60, "text": "[M]", "source": "spare_row"}
    assert document["next"] == f"zconvert plan {folder}"
    assert described(patch(folder, tidar={**settings, "stages": ["midtrain"]}))["next"] == f"zconvert generate {folder}"


def test_the_next_command_can_be_pasted_whatever_the_folders_name(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("zaya").rename(tiny_checkpoint("zaya").parent / "my model")
    assert shlex.split(described(folder)["next"])[2:] == [str(folder), "--out", "my model-tidar-init"]


def test_a_damaged_checkpoint_is_one_error_not_a_description(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("zaya")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        describe(resolve(folder))


def spoil_tokenizer(folder: Path, how: str) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    if how == "missing":
        return path.unlink()
    if how == "malformed":
        del tokenizer["model"]["vocab"]
    elif how == "too large":
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 64, "content": "<far>"})
    else:
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 62, "content": "<hole>"})
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "has no tokenizer.json"),
        ("malformed", "is not a tokenizer"),
        ("too large", "ids that the embedding has no row for"),
        ("with gaps", "--mask-token"),
    ],
)
def test_a_checkpoint_whose_tokenizer_cannot_be_used_is_described_and_refused_with_the_fix(
    tiny_checkpoint: Callable[..., Path], how: str, reason: str
) -> None:
    folder = tiny_checkpoint("zaya")
    spoil_tokenizer(folder, how)
    document = described(folder)
    assert (document["verdict"], document["mask_token"], document["next"]) == ("refused", None, None)
    assert reason in document["reason"]
    assert "\n" not in document["reason"]
    assert document["parameters"]["total"] > 0
    other = described(patch(folder, model_type="jamba"))
    assert "Mamba" in other["reason"]


QUANTISED = {
    "GPTQ in 4 bits": {"quant_method": "gptq", "bits": 4},
    "AWQ in 4 bits": {"quant_method": "awq", "bits": 4},
    "FP8 in 8 bits": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "MXFP4 in 4 bits": {"quant_method": "mxfp4"},
    "bitsandbytes in 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes in 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "compressed-tensors in 8 bits": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
    },
    "strange": {"quant_method": "strange"},
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_checkpoint_is_refused_by_its_config_with_what_to_do(
    tiny_checkpoint: Callable[..., Path], name: str
) -> None:
    folder = patch(tiny_checkpoint("mixtral"), quantization_config=QUANTISED[name])
    document = described(folder)
    assert document["verdict"] == "refused"
    assert f"quantised by {name}" in document["reason"]
    assert "unquantised checkpoint" in document["reason"]
    assert ("dequantize=True" in document["reason"]) == (QUANTISED[name]["quant_method"] in ("fp8", "mxfp4"))
    assert document["quantisation"]["method"] == QUANTISED[name]["quant_method"]
    inside = patch(folder, quantization_config=None, text_config={"quantization_config": QUANTISED[name]})
    assert described(inside)["quantisation"] == document["quantisation"]


# One linear layer of 64 × 128 as published checkpoints store it.
PACKED: dict[str, tuple[dict[str, Any] | None, dict[str, tuple[str, tuple[int, ...]]]]] = {
    "gptq": (
        QUANTISED["GPTQ in 4 bits"],
        {
            "qweight": ("I32", (128 * 4 // 32, 64)),
            "qzeros": ("I32", (1, 8)),
            "scales": ("F16", (1, 64)),
            "g_idx": ("I32", (128,)),
        },
    ),
    "awq": (
        QUANTISED["AWQ in 4 bits"],
        {"qweight": ("I32", (128, 8)), "qzeros": ("I32", (1, 8)), "scales": ("F16", (1, 64))},
    ),
    "fp8": (
        QUANTISED["FP8 in 8 bits"],
        {"weight": ("F8_E4M3", (64, 128)), "weight_scale_inv": ("F32", (1, 1))},
    ),
    "mxfp4": (
        QUANTISED["MXFP4 in 4 bits"],
        {"weight_blocks": ("U8", (64, 4, 16)), "weight_scales": ("U8", (64, 4))},
    ),
    "nf4": (
        QUANTISED["bitsandbytes in 4 bits"],
        {
            "weight": ("U8", (4096, 1)),
            "weight.absmax": ("U8", (128,)),
            "weight.quant_map": ("F32", (16,)),
            "weight.quant_state.bitsandbytes__nf4": ("U8", (120,)),
        },
    ),
    "int8": (QUANTISED["bitsandbytes in 8 bits"], {"weight": ("I8", (64, 128)), "SCB": ("F32", (64,))}),
    "untold": (None, {"weight": ("F8_E4M3", (64, 128))}),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_seen_in_the_headers_and_counted_unpacked(tmp_path: Path, name: str) -> None:
    section, tensors = PACKED[name]
    config = {"model_type": "llama", "num_hidden_layers": 1} | ({"quantization_config": section} if section else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    stem = "model.layers.0.mlp.up_proj"
    stored = {"model.embed_tokens.weight": ("BF16", (10, 128)), **{f"{stem}.{key}": t for key, t in tensors.items()}}
    write_sparse_file(tmp_path / "model.safetensors", stored)
    document = described(tmp_path)
    assert document["verdict"] == "refused"
    assert "packed weights" in document["reason"]
    assert document["quantisation"]["tensors"] == 1
    assert document["parameters"]["total"] == 10 * 128 + 64 * 128


def test_what_is_no_weight_does_not_make_a_checkpoint_quantised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    stored = {
        "ffn.gate.tid2eid": ("I64", (64, 2)),
        "ids": ("I32", (4, 4)),
        "model.embed_tokens.weight": ("F16", (4, 4)),
    }
    write_sparse_file(tmp_path / "model.safetensors", stored)
    assert described(tmp_path)["quantisation"] is None


def test_code_that_a_checkpoint_brings_is_never_run_and_a_strange_family_with_it_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("mixtral")
    (folder / "modeling_strange.py").write_text("raise SystemExit(9)")
    auto_map = {"AutoConfig": "org/repo--configuration_strange.C", "AutoModelForCausalLM": "modeling_strange.M"}
    document = described(patch(folder, auto_map=auto_map, model_type="strange"))
    assert document["verdict"] == "refused"
    assert "configuration_strange.py, modeling_strange.py) is never run" in document["reason"]
    # Code beside a model that transformers knows is not needed.
    assert described(patch(folder, model_type="mixtral"))["verdict"] == "supported"


def test_weights_in_pickles_alone_are_described_and_refused_with_how_to_convert_them(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("mixtral")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    document = described(folder)
    assert document["verdict"] == "refused"
    assert "pickled weights" in document["reason"]
    assert "save_pretrained" in document["reason"]
    assert document["parameters"] == {"total": None, "active": None, "active_without_embeddings": None}
    assert (document["layers"], document["experts"]["num"], document["kind"]) == (2, 4, "mixture_of_experts")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no weights"):
        describe(resolve(folder))


def test_missing_and_extra_tensors_are_told_against_the_index(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral", shards=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.more.weight"] = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    document = described(folder)
    assert document["verdict"] == "refused"
    assert "index and shards disagree" in document["reason"]
    difference = {"missing": 1, "extra": 1, "examples": ["model.more.weight", "model.norm.weight"]}
    assert document["index"] == {**difference, "missing_shards": []}


def test_a_missing_shard_is_told_with_the_tensors_that_are_not_there(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral", shards=3)
    shard = sorted(folder.glob("*.safetensors"))[1]
    lost = read_headers(folder).tensors
    shard.unlink()
    document = described(folder)
    assert document["index"]["missing_shards"] == [shard.name]
    assert document["index"]["missing"] == sum(t.shard == shard.name for t in lost.values())
    assert shard.name in document["reason"]
    assert document["parameters"]["total"] is None
    assert shard.name not in [entry["name"] for entry in document["shards"]]


def test_an_index_that_points_out_of_the_folder_is_one_error(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral", shards=3)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(UserError, match="outside of the folder"):
        describe(resolve(folder))


OLD_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Llama 4": (
        {"attention_chunk_size": 8192, "no_rope_layers": [1, 1, 1, 0] * 2},
        {"chunked_attention": 6, "full_attention": 2},
    ),
    "Llama 4 by interval": ({"attention_chunk_size": 8192}, {"chunked_attention": 6, "full_attention": 2}),
    "gpt-oss": ({"model_type": "gpt_oss", "sliding_window": 128}, {"sliding_attention": 4, "full_attention": 4}),
    "Cohere 2": (
        {"sliding_window": 9, "sliding_window_pattern": 4},
        {"sliding_attention": 6, "full_attention": 2},
    ),
    "Qwen 2 MoE": (
        {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_attention": 5, "full_attention": 3},
    ),
    "Mistral": ({"sliding_window": 9}, {"sliding_attention": 8}),
    "DeepSeek V3.2": ({"index_topk": 2048}, {"indexed_attention": 8}),
    "Nemotron-H": ({"layers_block_type": ["mamba", "moe"]}, {"mamba": 1, "moe": 1}),
    "DBRX": ({"num_hidden_layers": None, "n_layers": 8}, {"full_attention": 8}),
}


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_layer_types_are_worked_out_where_an_older_config_leaves_them_out(name: str) -> None:
    changes, types = OLD_CONFIGS[name]
    config = {"num_hidden_layers": 8, **changes}
    assert layer_types_of(config) == types
    assert layer_types_of({"num_hidden_layers": 8, "mamba_d_state": 16}) is None


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "inspect-json.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)", cell)} == KEYS
    assert all(f"`{key}`" in (describe.__doc__ or "") for key in KEYS)
