"""A gated checkpoint learns beside a source that is held in 8 or 4 bits, and comes out beside the untouched one."""

from __future__ import annotations

import importlib.util
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.contracts.families import make_family_model
from tests.contracts.models import random_ids
from tests.training.runs import assert_decodes_the_text_of, make_run, metrics_of, train_until
from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.layout import packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts
from zconvert.training import quantised, stages

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CPU = torch.device("cpu")
BITS = {"8bit": 8.2, "4bit": 4.8}
"""that a weight takes at most, its share of the scales included"""
FAMILIES = ("zaya", "mixtral", "gpt_oss", "deepseek_v3", "dbrx", "jetmoe", "inkling_text", "gemma4_text", "llama4_text")


def train(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    return stages.train(MidtrainRecipe(**settings, **changes, output_dir=str(folder)), lambda _progress: None)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    made = make_run(tmp_path, "mixtral", max_steps=12, diffusion={"objective": "data"})
    del made["output_dir"]
    convert_init(resolve(tmp_path / "source"), tmp_path / "gated", block_size=4, gated=GatedParts(rank=4, mlp_width=16))
    return {**made, "base_model": str(tmp_path / "gated")}


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", list(BITS))
def test_gated_weights_learn_beside_a_quantised_source_and_are_saved_beside_the_exact_one(
    settings: dict[str, Any], tmp_path: Path, quantization: str
) -> None:
    trained = train(tmp_path / "run", settings, quantization=quantization)
    losses = [row["loss_diffusion"] for row in metrics_of(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.1
    for shard in (tmp_path / "source").glob("*.safetensors"):
        assert sha256(trained / shard.name) == sha256(shard)

    assert_decodes_the_text_of(tmp_path / "source", trained)


@needs_bitsandbytes
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("quantization", list(BITS))
def test_a_packed_model_is_the_model_with_its_weights_rounded_in_value_and_in_gradient(
    model_type: str, quantization: str
) -> None:
    packed = make_family_model(model_type)
    rounded = deepcopy(packed)
    report = quantised.pack(packed, quantization, CPU)
    assert report.bytes_after * 8 < BITS[quantization] * report.bytes_before / 4
    for name, module in packed.named_modules():
        if parametrize.is_parametrized(module):
            for weight in module.parametrizations:  # type: ignore[union-attr]
                getattr(rounded.get_submodule(name), weight).data = getattr(module, weight)
    left = {name: p for name, p in packed.named_parameters() if ".parametrizations." not in name}
    assert all(p.ndim < 3 or "conv" in name for name, p in left.items()), "stacked experts are packed too"

    ids, gradients = random_ids((1, 24), seed=1), []
    layout = packed_layout(torch.zeros_like(ids), 4)
    for model in (packed, rounded):
        model.requires_grad_(False)
        torch.manual_seed(0)
        view = LayoutModel(model)
        weights = view.add_gated(GatedParts(rank=2, mlp="add", mlp_width=8))
        hidden = view.hidden_states(torch.cat([ids, ids], dim=1), layout)
        view.logits(hidden).square().mean().backward()
        gradients.append([hidden, *(p.grad for p in weights.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@needs_bitsandbytes
def test_routers_head_and_embeddings_stay_exact() -> None:
    for model_type in FAMILIES:
        model = make_family_model(model_type)
        exact = deepcopy(model)
        quantised.pack(model, "4bit", CPU)
        kept = 0
        for name, module in exact.named_modules():
            router = any(word in name for word in ("router", ".gate.")) or name.endswith(".gate")
            if router or isinstance(module, nn.Embedding) or module is exact.get_output_embeddings():
                for key, parameter in module.named_parameters(recurse=False):
                    assert torch.equal(getattr(model.get_submodule(name), key), parameter)
                    kept += 1
        assert kept > 2, "an embedding, a head and a router at least"


@needs_bitsandbytes
def test_a_quantised_run_that_was_stopped_continues_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", settings, quantization="4bit")
    recipe = MidtrainRecipe(**settings, quantization="4bit", output_dir=str(tmp_path / "run"))
    train_until(recipe, 5)
    resumed = stages.train(recipe, lambda _progress: None)
    assert sha256(resumed / "tidar" / "gated.safetensors") == sha256(whole / "tidar" / "gated.safetensors")


def test_a_checkpoint_of_which_every_weight_is_trained_is_not_quantised(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cannot be trained with quantised weights"):
        train(tmp_path / "run", {**settings, "base_model": str(tmp_path / "init")}, quantization="8bit")


def test_without_bitsandbytes_the_error_says_how_to_get_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        train(tmp_path / "run", settings, quantization="8bit")
