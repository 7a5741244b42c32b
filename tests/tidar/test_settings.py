"""The `tidar` section of config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from zconvert.tidar.settings import FORMAT_VERSION, GatedParts, TidarSettings, check_proposals


def test_settings_survive_json() -> None:
    settings = TidarSettings(
        block_size=8,
        mask_token_id=7,
        mask_token="<|mask|>",
        mask_token_source="spare_row",
        block_offset="random",
        proposals=(1, 3, 5),
        base_model="org/name",
        base_revision="0123abc",
        stages=("midtrain",),
    )
    section = json.loads(json.dumps(settings.to_dict()))
    assert section["proposals"] == [1, 3, 5]
    assert section["format_version"] == FORMAT_VERSION
    assert TidarSettings.from_dict(section) == settings


def test_two_keys_suffice_and_unknown_ones_are_of_a_newer_minor_version() -> None:
    assert TidarSettings.from_dict({"block_size": 4, "mask_token_id": 9, "colour": "red"}) == TidarSettings(4, 9)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "tidar section lacks block_size, mask_token_id"),
        ({"block_size": 4}, "tidar section lacks mask_token_id"),
        ({"block_size": 1, "mask_token_id": 1}, "tidar.block_size is 1, expected 2 to"),
        ({"block_size": "4", "mask_token_id": 1}, "tidar.block_size is '4', expected a whole number"),
        ({"block_size": 4, "mask_token_id": True}, "tidar.mask_token_id is True, expected a whole number"),
        ({"block_size": 4, "mask_token_id": 1, "mask_token": None}, "tidar.mask_token is None, expected text"),
        ({"block_size": 4, "mask_token_id": 1, "proposals": ["1"]}, "expected whole numbers"),
        ({"block_size": 4, "mask_token_id": 1, "proposals": 3}, "expected a list"),
        ({"block_size": 4, "mask_token_id": -1}, "tidar.mask_token_id is -1"),
        ({"block_size": 4, "mask_token_id": 9, "mask_token_source": "virtual"}, "virtual, expected mode gated"),
        ({"block_size": 4, "mask_token_id": 1, "format_version": 2}, "format_version is 2, .* upgrade"),
        ({"block_size": 4, "mask_token_id": 1, "proposals": [1, 5]}, "from 1 to 4"),
        ({"block_size": 4, "mask_token_id": 1, "proposals": []}, "from 1 to 4"),
    ],
)
def test_a_section_that_cannot_work_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TidarSettings.from_dict(section)


def test_lossless_is_against_the_source_where_it_is_frozen_and_against_itself_where_it_moved() -> None:
    gated = TidarSettings(4, 9, mode="gated", gated=GatedParts(), base_model="org/base")
    assert gated.lossless_means() == "gated: lossless means the text of org/base"
    assert replace(gated, base_model=None).lossless_means().endswith("the text of its source")
    full = replace(gated, mode="full", gated=None)
    assert full.lossless_means().endswith("this checkpoint's own AR decoding, not of org/base")


def test_proposals_are_sorted_without_repeats() -> None:
    assert check_proposals((5, 1, 5, 3), 8) == (1, 3, 5)
    with pytest.raises(ValueError, match=r"proposals are \[0, 2\]"):
        check_proposals((0, 2), 8)


def test_all_proposals_are_the_default() -> None:
    assert TidarSettings(3, 0).default_proposals() == (1, 2, 3)
    assert TidarSettings(3, 0, proposals=(2,)).default_proposals() == (2,)
