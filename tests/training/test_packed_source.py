"""A source that is stored in MXFP4 is converted in gated mode: nothing of it is written, and loading unpacks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.tiny import make_tokenizer
from tests.training.runs import assert_decodes_the_text_of, make_run, metrics_of
from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.merge import merge_to_ar
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.settings import GatedParts
from zconvert.training import stages

PARTS = GatedParts(rank=4, mlp_width=16)
_BLOCK = 32  # numbers that share a scale, two of them in a byte


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A tiny gpt-oss as it is released: experts in blocks and scales, the rest in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss",
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256},
        **{"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "eos_token_id": 1},
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    folder = tmp_path / "packed"
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(64).save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // _BLOCK)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, _BLOCK // 2), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(120, 124, shape, dtype=torch.uint8)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def test_its_gated_checkpoint_learns_decodes_its_text_and_gives_it_back(packed: Path, tmp_path: Path) -> None:
    settings = make_run(tmp_path / "other", "mixtral", max_steps=12, diffusion={"objective": "data"})
    convert_init(resolve(packed), tmp_path / "gated", verify="logits", block_size=4, gated=PARTS)
    recipe = MidtrainRecipe(**{**settings, "base_model": str(tmp_path / "gated")})
    trained = stages.train(recipe, lambda _progress: None)
    losses = [row["loss_diffusion"] for row in metrics_of(Path(settings["output_dir"]))]
    assert losses[-1] < losses[0] - 0.1

    assert_decodes_the_text_of(packed, trained)

    merge_to_ar(resolve(trained), tmp_path / "merged")
    for path in packed.iterdir():
        assert sha256(tmp_path / "merged" / path.name) == sha256(path)


def test_full_training_of_it_is_refused_with_both_ways_out(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be converted") as caught:
        convert_init(resolve(packed), tmp_path / "full", block_size=4)
    assert "Mxfp4Config(dequantize=True)" in str(caught.value.found)
    assert "--mode gated" in str(caught.value.found)


def test_other_packed_weights_are_refused_in_gated_mode_too(packed: Path, tmp_path: Path) -> None:
    path = packed / "config.json"
    path.write_text(path.read_text().replace("mxfp4", "gptq"))
    with pytest.raises(UserError, match="cannot be converted"):
        convert_init(resolve(packed), tmp_path / "gated", block_size=4, gated=PARTS)
