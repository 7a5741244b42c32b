"""Facts from the headers of saved checkpoints, whatever names a family gives its tensors on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.checkpoint.test_parameters import tiny_model
from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.source import resolve
from zconvert.planning.from_config import knows
from zconvert.planning.model import facts_from_config
from zconvert.planning.target import find_target
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts

FAMILIES = (
    *("dbrx", "gemma4_text", "granitemoehybrid", "inkling_text", "jetmoe", "laguna", "lfm2_moe", "longcat_flash"),
    *("deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "phi3", "qwen3_moe", "zaya"),
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_headers_tell_parameters_and_gated_weights_exactly(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, 4, "cpu")
    model.save_pretrained(tmp_path / "saved")
    target = find_target(str(tmp_path / "saved"))
    counts = describe(resolve(tmp_path / "saved"))["parameters"]
    assert (target.facts.total, target.facts.active) == (counts["total"], counts["active"])
    parts = GatedParts(rank=3, mlp_width=5)
    weights = LayoutModel(model).add_gated(parts)
    assert target.facts.gated_parameters(parts) == sum(weight.numel() for weight in weights.parameters())
    if knows(model_type):
        by_config = dataclasses.asdict(facts_from_config(target.config, target.facts.name))
        by_headers = dataclasses.asdict(target.facts)
        for facts in (by_config, by_headers):
            facts.pop("stored_bytes")  # the tiny models are saved in float32, whatever their config says
            facts["projections"] = sorted(facts["projections"])
        assert by_config == by_headers
