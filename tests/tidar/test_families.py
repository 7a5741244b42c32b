"""The family table: who is converted, and who is refused and why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.contracts.models import CONTRACT_MODELS, make_model
from zconvert.tidar.families import FAMILIES, REFUSED, judge

# Of the design's list of families; those told by their layers alone are tested below.
REASONS = {
    "nemotron_h": "Mamba",
    "jamba": "Mamba",
    "qwen3_next": "delta-net",
    "qwen3_5_moe_text": "delta-net",
    "kimi_linear": "KDA",
    "bailing_hybrid": "linear-attention",
    "qwen4_exp": "delta-net",
    "minimax": "lightning",
    "minimax_m3_vl_text": "indexer",
    "deepseek_v4": "compressed",
    "doge": "router",
    "inkling2_text": "convolutions",
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_of_the_table_are_supported(model_type: str) -> None:
    verdict = judge({"model_type": model_type})
    assert verdict.supported
    assert verdict.family is FAMILIES[model_type]
    assert verdict.reason is None


@pytest.mark.parametrize("model_type", sorted(REASONS | REFUSED))
def test_families_that_cannot_work_are_refused_with_the_reason(model_type: str) -> None:
    verdict = judge({"model_type": model_type})
    assert not verdict.supported
    assert verdict.family is None
    assert verdict.reason is not None
    assert REASONS[model_type] in verdict.reason


@pytest.mark.parametrize("layer", ["mamba", "linear_attention", "conv", "recurrent"])
@pytest.mark.parametrize("model_type", ["granitemoehybrid", "mixtral", "zaya"])
def test_layers_decide_not_the_model_type(model_type: str, layer: str) -> None:
    verdict = judge({"model_type": model_type, "layer_types": ["full_attention", layer, layer]})
    assert not verdict.supported
    assert verdict.reason is not None
    assert layer in verdict.reason


@pytest.mark.parametrize("layer", ["full_attention", "sliding_attention", "hybrid", "hybrid_sliding"])
def test_attention_layers_are_fine(layer: str) -> None:
    assert judge({"model_type": "mixtral", "layer_types": [layer]}).supported


@pytest.mark.parametrize(
    "config", [{"model_type": "something_new"}, {}, {"model_type": None}, {"model_type": ["zaya"]}], ids=str
)
def test_an_unknown_family_is_refused_and_the_known_ones_named(config: dict) -> None:
    verdict = judge(config)
    assert not verdict.supported
    assert "mixtral, qwen3_moe, zaya" in str(verdict.reason)


@pytest.mark.parametrize("layer_types", [5, "full_attention", [{}], [None]], ids=str)
def test_layer_types_that_are_no_list_of_names_are_said_to_be_so(layer_types: object) -> None:
    verdict = judge({"model_type": "zaya", "layer_types": layer_types})
    assert not verdict.supported
    assert "expected a list of names" in str(verdict.reason)


def test_every_family_of_the_table_has_a_contract_model() -> None:
    tested = {make_model(name).config.model_type for name in CONTRACT_MODELS}
    assert tested == set(FAMILIES)


def test_judging_needs_no_torch() -> None:
    code = "import sys, zconvert.tidar.families, zconvert.tidar.settings; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
