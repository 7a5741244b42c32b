"""Positions that reach further: config.json as transformers reads it, in every layout that it has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoint.tiny import make_checkpoint
from zconvert.checkpoint.rope import RopeChange, config_changes, extended
from zconvert.checkpoint.source import Source, resolve
from zconvert.errors import UserError

FLAT = {"head_dim": 16, "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
OLD = {"head_dim": 16, "max_position_embeddings": 256, "rope_theta": 1e4, "rope_scaling": None}


def test_a_stretched_base_divides_the_slowest_frequency_by_the_factor() -> None:
    theta = config_changes(FLAT, RopeChange(1024))["rope_parameters"]["rope_theta"]
    slowest = 14 / 16
    assert 1e4**slowest / theta**slowest == pytest.approx(1 / 4)


def test_a_base_that_is_given_is_written() -> None:
    changes = config_changes(OLD, RopeChange(1024, theta=1e6))
    assert changes == {"rope_theta": 1e6, "max_position_embeddings": 1024}


def test_yarn_is_written_in_the_layout_that_is_there() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert config_changes(FLAT, RopeChange(1024, method="yarn"))["rope_parameters"] == {"rope_theta": 1e4, **yarn}
    assert config_changes(OLD, RopeChange(1024, method="yarn"))["rope_scaling"] == yarn
    quiet = config_changes(FLAT, RopeChange(1024, method="yarn", attention_factor=1.0))["rope_parameters"]
    assert quiet["attention_factor"] == 1.0


def test_yarn_is_extended_from_the_length_before_yarn_and_linear_from_its_factor() -> None:
    once = {**FLAT, **config_changes(FLAT, RopeChange(1024, method="yarn"))}
    twice = config_changes(once, RopeChange(2048, method="yarn"))["rope_parameters"]
    assert (twice["factor"], twice["original_max_position_embeddings"]) == (8.0, 256)
    once = {**FLAT, **config_changes(FLAT, RopeChange(1024, method="linear"))}
    assert config_changes(once, RopeChange(2048, method="linear"))["rope_parameters"]["factor"] == 8.0


def test_each_layer_type_that_sees_everything_is_changed_and_keeps_its_other_parameters() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = {**FLAT, "rope_parameters": {"hybrid": rope, "hybrid_sliding": rope}}
    changed = config_changes(config, RopeChange(1024, theta=1e6))["rope_parameters"]
    assert changed == {"hybrid": {**rope, "rope_theta": 1e6}, "hybrid_sliding": rope}
    both = config_changes(config, RopeChange(1024, theta=1e6, layer_types=["hybrid", "hybrid_sliding"]))
    assert both["rope_parameters"]["hybrid_sliding"]["rope_theta"] == 1e6
    # Half of the head rotates: d = 8.
    stretched = config_changes(config, RopeChange(1024))["rope_parameters"]["hybrid"]["rope_theta"]
    assert stretched == pytest.approx(1e4 * 4 ** (8 / 6))
    with pytest.raises(UserError, match="does not have"):
        config_changes(config, RopeChange(1024, layer_types=["full"]))


def test_the_longest_position_is_never_made_shorter() -> None:
    assert "max_position_embeddings" not in config_changes(FLAT, RopeChange(128, original_len=64))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (FLAT, RopeChange(256), "would not become longer"),
        ({"head_dim": 16, "max_position_embeddings": 256}, RopeChange(512), "how the model rotates"),
        ({"rope_theta": 1e4}, RopeChange(512), "how long the model's context is"),
        (
            {**FLAT, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            RopeChange(1024),
            "rope: theta cannot extend",
        ),
    ],
)
def test_what_cannot_be_extended_so_is_told(config: dict[str, Any], change: RopeChange, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_changes(config, change)


@pytest.mark.parametrize("method", ["theta", "linear", "yarn"])
@pytest.mark.parametrize("model_type", ["zaya", "qwen3_moe"])
def test_transformers_builds_the_frequencies_that_were_asked_for(tmp_path: Path, model_type: str, method: Any) -> None:
    source = resolve(make_checkpoint(tmp_path / "source", model_type))
    before = (source.folder / "config.json").read_bytes()
    extended(source, RopeChange(1024, method=method), tmp_path / "view")
    view = Source(tmp_path / "view", source.name, source.revision)
    assert (source.folder / "config.json").read_bytes() == before
    config = AutoConfig.from_pretrained(view.folder)
    assert config.max_position_embeddings == 1024
    plain, further = (AutoModelForCausalLM.from_pretrained(f).model.rotary_emb for f in (source.folder, view.folder))
    kind = "hybrid_" if model_type == "zaya" else ""
    old, new = (getattr(rope, f"{kind}inv_freq") for rope in (plain, further))
    ratio = old / new
    assert ratio[-1] == pytest.approx(4.0, rel=1e-4)  # the slowest
    assert ratio[0] == pytest.approx(4.0 if method == "linear" else 1.0, rel=1e-4)  # the fastest
    scale = getattr(further, f"{kind}attention_scaling")
    assert scale == pytest.approx(0.1 * math.log(4) + 1 if method == "yarn" else 1.0)
    if model_type == "zaya":  # a window of 16 needs nothing
        assert torch.equal(plain.hybrid_sliding_inv_freq, further.hybrid_sliding_inv_freq)


def test_a_view_made_again_is_the_newest_one(tmp_path: Path) -> None:
    source = resolve(make_checkpoint(tmp_path / "source", "mixtral"))
    extended(source, RopeChange(512), tmp_path / "view")
    extended(source, RopeChange(1024), tmp_path / "view")
    view = Source(tmp_path / "view", source.name, source.revision)
    config = json.loads((view.folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    assert (view.folder / "model.safetensors").is_symlink()
