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
