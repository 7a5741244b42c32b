"""What `inspect` says of a checkpoint agrees with the model that transformers builds from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import MODEL_TYPES
from zconvert.checkpoint.describe import count_parameters, describe
from zconvert.checkpoint.headers import Headers, TensorInfo, read_headers
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError

KEYS = {
    *("name", "revision", "model_type", "architectures", "verdict", "reason", "layers", "layer_types", "experts"),
    *("attention", "context_length", "rope", "dtypes", "parameters", "vocabulary", "tied_embeddings", "mask_token"),
    *("shards", "tidar", "next"),
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
    assert document["experts"] == {"num": 4, "per_token": per_token}
    attention = {**document["attention"], "sliding_window": None}
    assert attention == {"heads": 2, "kv_heads": 1, "head_dim": 16, "sliding_window": None}
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


def test_published_models_have_their_known_sizes() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    qwen = {"vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
    qwen |= {"num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128}
    known = {
        ("zaya", ()): (8.84, 1.29, 0.75),
        ("qwen3_moe", (*qwen.items(), ("num_experts_per_tok", 8))): (30.53, 3.35, 2.73),
    }
    for (model_type, options), answer in known.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **dict(options)))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        tensors = {name: TensorInfo(name, "BF16", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()}
        counts = count_parameters(Headers(tensors, ()), model.config.to_dict())
        assert tuple(round(counts[key] / 1e9, 2) for key in counts) == answer  # type: ignore[operator]


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


def test_a_dense_model_has_no_experts_and_all_its_parameters_are_active(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "llama")
    document = described(tmp_path / "llama")
    assert document["experts"] is None
    assert document["parameters"]["active"] == document["parameters"]["total"]


def test_the_language_model_inside_a_composite_model_is_described(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "some_vl", "text_config": config}))
    document = described(folder)
    assert document["verdict"] == "refused"
    assert document["experts"] == {"num": 4, "per_token": 2}


def test_a_converted_checkpoint_shows_its_settings_and_the_next_command(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("zaya")
    assert described(folder)["next"] == f"zconvert convert-init {folder} --out zaya-tidar-init"
    settings = {"block_size": 4, "mask_token_id": 60, "mask_token": "[M]", "mask_token_source": "spare_row"}
    document = described(patch(folder, tidar=settings))
    assert document["tidar"]["block_size"] == 4
    assert document["mask_token"] == {"id": 60, "text": "[M]", "source": "spare_row"}
    assert document["next"].startswith("zconvert midtrain")
    assert described(patch(folder, tidar={**settings, "stages": ["midtrain"]}))["next"] == f"zconvert generate {folder}"


def test_a_damaged_checkpoint_is_one_error_not_a_description(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("zaya")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        describe(resolve(folder))


def test_a_tokenizer_that_does_not_fit_the_model_is_one_error(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("zaya")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 64, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="tokenizer"):
        describe(resolve(folder))
