"""What an exported model says of itself: lineage, licence, how to run it, and nothing that was not measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from zconvert.checkpoint.card import Facts, inherited_metadata, model_card
from zconvert.checkpoint.folder import BASE_CARD
from zconvert.errors import UserError
from zconvert.tidar.settings import GatedParts, TidarSettings

RESULTS = {
    "device": "cpu",
    "results": {
        "ar": {"tokens_per_second": 100.0},
        "lossless": {"tokens_per_forward": 4.07, "tokens_per_second": 220.0, "speedup": 2.2},
    },
}


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_licence_is_recognised_by_its_text_where_no_card_names_it(tmp_path: Path) -> None:
    assert inherited_metadata(tmp_path) == {}
    (tmp_path / "LICENSE").write_text("MIT License\n\nPermission is granted, without restriction")
    assert inherited_metadata(tmp_path) == {"license": "mit"}
    (tmp_path / "LICENSE").write_text("   Apache License\n   Version 2.0, January 2004\n")
    assert inherited_metadata(tmp_path) == {"license": "apache-2.0"}
    (tmp_path / BASE_CARD).write_text("---\nlicense: cc-by-4.0\n---\n")
    assert inherited_metadata(tmp_path) == {"license": "cc-by-4.0"}
    (tmp_path / BASE_CARD).write_text("---\n: {[\n---\n")
    assert inherited_metadata(tmp_path) == {"license": "apache-2.0"}


def card(settings: TidarSettings, **options: Any) -> str:
    return model_card("tiny", settings, {"model_type": "mixtral"}, {}, Facts(**options))


def test_the_card_links_a_base_of_the_hub_and_only_names_a_local_one() -> None:
    settings = TidarSettings(4, 60, base_model="org/name", base_revision="abc")
    metadata = front_matter(card(settings))
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/name", "finetune")
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert "https://huggingface.co/org/name) at commit `abc`" in card(settings)
    assert "base_model" not in front_matter(card(dataclasses.replace(settings, base_model="name")))


def test_the_card_never_claims_what_was_not_measured() -> None:
    settings = TidarSettings(4, 60, base_model="org/name")
    bare = card(settings)
    assert "Nothing was measured" in bare
    assert "Not trained yet" in bare
    assert "It is not known from its files" in bare
    measured = card(dataclasses.replace(settings, stages=("midtrain",)), results=RESULTS)
    assert "| lossless | 4.07 | 220.0 | 2.20× |" in measured
    assert "| ar | not measured | 100.0 | not measured |" in measured
    assert "Not trained yet" not in measured
    assert "midtrain" in measured


def test_the_card_of_a_gated_checkpoint_promises_the_base_models_own_text_and_no_other_does() -> None:
    settings = TidarSettings(4, 60, base_model="org/name", stages=("midtrain",))
    gated = dataclasses.replace(settings, mask_token="", mask_token_source="virtual", mode="gated", gated=GatedParts())
    for text in ("byte for byte", "bit for bit", "whose weights nothing has moved", "none in the vocabulary"):
        assert text in card(gated)
        assert text not in card(settings)
    assert "not\nlossless with respect to the base model" in card(settings)
    assert "lossless with respect" not in card(gated)
    assert "suppresses it" not in card(gated)
    named = dataclasses.replace(gated, mask_token="<gap>", mask_token_source="spare_row")
    assert "Never let it emit the mask token `<gap>` (id 60)" in card(named)


@pytest.mark.parametrize("results", [{}, {"results": {}}, {"results": {"ar": 3}}, {"results": 3}])
def test_results_that_are_none_of_bench_are_a_users_error(results: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not those of a bench run"):
        card(TidarSettings(4, 60), results=results)


def test_the_card_shows_three_ways_to_run_it_its_limits_and_what_engines_do() -> None:
    settings = TidarSettings(4, 60, stages=("midtrain",))
    text = card(settings, serving="- vllm: `vllm serve PATH_OR_HUB_ID`: listed")
    for part in (
        "With TiDAR decoding",
        "plain autoregressive model",
        "In a serving engine",
        "none decodes by TiDAR yet",
    ):
        assert f"{part}" in text
    assert "- vllm: `vllm serve" in text
    assert "tokens per forward is not speed" in text
    assert "All weights were trained further" in text
    assert "All weights were trained further" not in card(dataclasses.replace(settings, stages=()))


def test_a_model_of_text_and_images_is_loaded_by_its_own_class() -> None:
    config = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": {}}
    assert "import Llama4ForConditionalGeneration, AutoTokenizer" in model_card("x", TidarSettings(4, 60), config, {})
    assert "import AutoModelForCausalLM, AutoTokenizer" in card(TidarSettings(4, 60))


def test_the_card_tells_the_commands_and_the_tokens_of_each_stage() -> None:
    settings = TidarSettings(4, 60, stages=("midtrain", "sft"))
    history = [
        {"stage": "convert-init", "recipe": {}},
        {"stage": "midtrain", "recipe": {}, "steps": 600, "tokens_seen": 1_228_800},
        {"stage": "sft", "recipe": {"output_dir": "out/sft"}, "steps": 20, "tokens_seen": 5},
    ]
    text = card(settings, history=history)
    assert "midtrain (600 steps, 1,228,800 tokens), sft (20 steps, 5 tokens)" in text
    for line in ("convert-init zconvert_config.yaml", "midtrain zconvert_config.yaml", "export out/sft --out DIR"):
        assert f"zconvert {line}\n" in text
    assert "zconvert sft 3-sft.yaml  # its recipe" in card(settings, history=[*history, history[-1]])
    assert "not kept" in card(settings)
    assert "training stages: midtrain, sft\n" in card(settings, history=history[:2])  # it tells of other stages


def test_the_card_has_a_table_for_each_task_with_intervals_where_they_are() -> None:
    evaluation = {
        "device": "cpu",
        "n": 16,
        "tasks": {
            "sums": {
                "columns": {
                    "source ar": {"pass@1": 0.5, "interval": {"pass@1": [0.4, 0.6]}},
                    "lossless": {
                        "pass@1": 0.525,
                        "pass@16": 1.0,
                        "interval": {"pass@1": [0.45, 0.6]},
                        "tokens_per_forward": 4.0,
                        "tokens_per_second": 12.34,
                        "speedup": 2.5,
                        "difference": {"ar": {"pass@1": {}}},
                    },
                }
            },
            "broken": 3,
        },
    }
    text = card(TidarSettings(4, 60), evaluation=evaluation)
    assert "| sampler | pass@1 | pass@16 | tokens per forward | tokens/s | ratio to AR |" in text
    assert "| source ar | 50.0% (40.0 to 60.0) | not measured | not measured | not measured | not measured |" in text
    assert "| lossless | 52.5% (45.0 to 60.0) | 100.0% | 4.00 | 12.3 | 2.50× |" in text
    assert "Decoding speed was not measured" in text
    assert "Measured with device cpu, n 16." in text
    assert "broken" not in text
    assert "before the weights" not in text
    assert "before the weights were stored as bfloat16" in card(
        TidarSettings(4, 60), evaluation=evaluation, rewritten={"dtype": "bfloat16"}
    )
    both = card(TidarSettings(4, 60), evaluation=evaluation, results=RESULTS)
    assert "| lossless | 4.07 | 220.0 | 2.20× |" in both
    assert "Quality was not measured" in card(TidarSettings(4, 60), results=RESULTS)
    for odd in ({}, {"tasks": {}}, {"tasks": 3}, {"tasks": {"a": {"b": {"pass@x": 1}}}}):
        assert "Nothing was measured" in card(TidarSettings(4, 60), evaluation=odd)


@pytest.mark.parametrize(
    ("rewritten", "text"),
    [
        ({}, "are here byte for byte"),
        ({"shards": 3}, "are here value for value, in other files"),
        ({"dtype": "bfloat16"}, "are here stored as bfloat16"),
    ],
)
def test_the_card_of_a_gated_model_claims_no_more_than_its_weight_files_keep(
    rewritten: dict[str, Any], text: str
) -> None:
    settings = TidarSettings(4, 60, mask_token="", mask_token_source="virtual", mode="gated", gated=GatedParts())
    written = card(settings, rewritten=rewritten)
    assert text in written
    assert ("bit for bit" in written) == ("dtype" not in rewritten)
