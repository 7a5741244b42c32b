"""Shapes from config.json are those of transformers' own models, and published counts come out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.checkpoint.sparse import meta_shapes
from tests.checkpoint.test_parameters import tiny_model
from tests.planning.models import DEEPSEEK_V3, GPT_OSS_20B, MIXTRAL, OLMOE, QWEN3_30B, ZAYA_8B
from zconvert.errors import UserError
from zconvert.planning.from_config import _BUILDS, knows, shapes_from_config
from zconvert.planning.model import facts_from_config
from zconvert.tidar.families import FAMILIES
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts


def config_of(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False))


@pytest.mark.parametrize("model_type", sorted(_BUILDS))
def test_names_and_shapes_are_those_of_the_model(model_type: str) -> None:
    model = tiny_model(model_type, 4, "meta")
    tied = {*(getattr(model, "all_tied_weights_keys", None) or {})}
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    assert shapes_from_config(config_of(model)) == stored


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2", "olmoe", "deepseek_v3", "glm4_moe", "llama", "gpt_oss"])
@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"tie_word_embeddings": True, "use_qk_norm": True}])
def test_biases_norms_and_ties_follow_the_config(model_type: str, changes: dict[str, Any]) -> None:
    config = config_of(tiny_model(model_type, 4, "meta"))
    taken = {key: value for key, value in changes.items() if key in config or key == "tie_word_embeddings"}
    shapes, changed = meta_shapes(model_type, **{k: v for k, v in {**config, **taken}.items() if k != "model_type"})
    assert {k: v for k, v in shapes_from_config(changed).items() if "correction_bias" not in k} == shapes


@pytest.mark.parametrize("model_type", sorted(_BUILDS))
@pytest.mark.parametrize(
    "parts",
    [GatedParts(rank=3, mlp_width=5), GatedParts(rank=0, mlp="add", mlp_width=5, norms=True, mask_embedding=False)],
    ids=["replace", "add"],
)
def test_gated_weights_are_counted_exactly(model_type: str, parts: GatedParts) -> None:
    model = tiny_model(model_type, 4, "cpu")
    facts = facts_from_config(config_of(model), model_type)
    weights = LayoutModel(model).add_gated(parts)
    assert facts.gated_parameters(parts) == sum(weight.numel() for weight in weights.parameters())


@pytest.mark.parametrize(
    ("model_type", "config", "total", "active"),
    [
        ("qwen3_moe", QWEN3_30B, 30.53, 3.35),
        ("zaya", ZAYA_8B, 8.84, 1.29),
        ("mixtral", MIXTRAL, 46.70, 12.88),
        ("olmoe", OLMOE, 6.92, 1.28),
        ("gpt_oss", GPT_OSS_20B, 20.91, 4.19),
        ("deepseek_v3", DEEPSEEK_V3, 671.03, 37.55),
    ],
)
def test_published_models_have_their_published_parameters(
    model_type: str, config: dict[str, Any], total: float, active: float
) -> None:
    """As on their model cards: 30.5 and 3.3 B; 8.8 B; 46.7 and 12.9 B; 7 and 1.3 B; 21 and 3.6 B; 671 and 37 B.

    gpt-oss's card leaves its embedding out of the active parameters, DeepSeek's both embedding and head in part.
    """
    facts = facts_from_config({"model_type": model_type, **config}, model_type)
    assert (round(facts.total / 1e9, 2), round(facts.active / 1e9, 2)) == (total, active)


def test_most_families_of_the_table_can_be_planned_by_their_config_alone() -> None:
    assert {*_BUILDS} <= {*FAMILIES}
    assert len(_BUILDS) >= 50
    assert not knows("dbrx")


@pytest.mark.parametrize("model_type", ["dbrx", "nothing"])
def test_a_family_built_in_another_way_wants_headers(model_type: str) -> None:
    with pytest.raises(UserError, match=r"cannot be told from config\.json alone") as raised:
        shapes_from_config({"model_type": model_type})
    assert "headers are read" in str(raised.value)


@pytest.mark.parametrize("value", [None, 0, -4, "8", True])
def test_a_missing_or_impossible_size_is_named(value: object) -> None:
    config = config_of(tiny_model("mixtral", 4, "meta")) | {"hidden_size": value}
    with pytest.raises(UserError, match=r"config\.json does not say hidden_size"):
        shapes_from_config(config)
