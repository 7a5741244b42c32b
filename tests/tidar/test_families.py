"""The family table: who is converted, and who is refused and why."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    verdict = judge({"model_type": model_type, "layer_types": ["full_attention"]})
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


def test_a_hybrid_family_without_recurrent_layers_is_supported() -> None:
    assert judge({"model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]}).supported
    assert judge({"model_type": "lfm2_moe", "layer_types": ["conv", "full_attention"]}).supported


def test_a_hybrid_config_that_names_no_layers_is_refused() -> None:
    assert "Mamba" in str(judge({"model_type": "granitemoehybrid"}).reason)


@pytest.mark.parametrize("layer", ["full_attention", "sliding_attention", "chunked_attention", "hybrid_sliding"])
def test_attention_layers_are_fine(layer: str) -> None:
    assert judge({"model_type": "mixtral", "layer_types": [layer]}).supported


@pytest.mark.parametrize(
    "config", [{"model_type": "something_new"}, {}, {"model_type": None}, {"model_type": ["zaya"]}], ids=str
)
def test_an_unknown_family_is_refused_and_told_what_it_would_take(config: dict) -> None:
    verdict = judge(config)
    assert not verdict.supported
    assert repr(config.get("model_type")) in str(verdict.reason)
    assert "a row there and a contract test" in str(verdict.reason)


def test_a_composite_model_is_what_its_text_model_is() -> None:
    gemma = judge({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}})
    assert gemma.family is FAMILIES["gemma4_text"]
    refused = judge({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}})
    assert "of its text model: delta-net" in str(refused.reason)
    untested = judge({"model_type": "new_vl", "text_config": {"model_type": "llama"}})
    assert "not among the composite models that were tested" in str(untested.reason)


def test_dense_families_have_no_experts_and_the_others_do() -> None:
    assert FAMILIES["llama"].dense
    assert not FAMILIES["zaya"].dense


@pytest.mark.parametrize("layer_types", [5, "full_attention", [{}], [None]], ids=str)
def test_layer_types_that_are_no_list_of_names_are_said_to_be_so(layer_types: object) -> None:
    verdict = judge({"model_type": "zaya", "layer_types": layer_types})
    assert not verdict.supported
    assert "expected a list of names" in str(verdict.reason)


def test_judging_needs_no_torch() -> None:
    code = "import sys, zconvert.tidar.families, zconvert.tidar.settings; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
