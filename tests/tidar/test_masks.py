"""Masks by route, with windows, in the form that every attention of transformers takes."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from zconvert.tidar.families import FAMILIES, Family
from zconvert.tidar.layout import decode_layout, packed_layout
from zconvert.tidar.masks import additive, attention_masks, layer_windows, visible

ROW = packed_layout(torch.zeros(1, 6, dtype=torch.long), 2)
LOWEST = torch.finfo(torch.float32).min
SINGLE = Family("any", mixing="attention", mask_route="single")
LAYERED = Family("any", mixing="attention", mask_route="layer_type")


def test_a_window_counts_positions_in_both_halves() -> None:
    seen = visible(ROW, ROW, window=3)[0].int().tolist()
    assert seen[5] == [0, 0, 0, 1, 1, 1] + [0] * 6  # clean 5: 3, 4, 5
    #                      clean 0 … 5       slots 0 … 5; their block starts at 4
    assert seen[6 + 4] == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert seen[6 + 5] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert visible(ROW, ROW, window=1)[0, 6 + 5].int().tolist() == [0] * 11 + [1]


def test_a_window_as_long_as_the_text_hides_nothing() -> None:
    assert torch.equal(visible(ROW, ROW, window=6), visible(ROW, ROW))


def test_additive_masks_are_zero_where_seen_and_the_lowest_number_elsewhere() -> None:
    seen = torch.tensor([[[True, False], [True, True]]])
    assert additive(seen, torch.float32).tolist() == [[[[0.0, LOWEST], [0.0, 0.0]]]]
    assert additive(seen, torch.bfloat16).dtype == torch.bfloat16


def test_the_single_route_gives_one_mask_with_the_models_window() -> None:
    for window in (None, 3):
        mask = attention_masks(SINGLE, SimpleNamespace(sliding_window=window), ROW, 0, torch.float32)
        assert mask.shape == (1, 1, 12, 12)
        assert torch.equal(mask[:, 0] == 0, visible(ROW, ROW, window))
    assert attention_masks(SINGLE, SimpleNamespace(), ROW, 0, torch.float32).shape == (1, 1, 12, 12)


def test_the_layer_type_route_gives_a_mask_for_each_layer_type() -> None:
    kinds = ["hybrid", "hybrid_sliding", "full_attention", "sliding_attention", "hybrid"]
    config = SimpleNamespace(layer_types=kinds, sliding_window=3)
    masks = attention_masks(LAYERED, config, ROW, 0, torch.float32)
    assert sorted(masks) == sorted(set(kinds))
    for kind, mask in masks.items():
        window = 3 if "sliding" in kind else None
        assert torch.equal(mask[:, 0] == 0, visible(ROW, ROW, window)), kind
    assert masks["hybrid"] is masks["full_attention"], "the same mask is made once"


def test_windows_are_those_of_the_layer_types_present() -> None:
    config = SimpleNamespace(layer_types=["hybrid", "hybrid_sliding"], sliding_window=9)
    assert layer_windows(config) == {"hybrid": None, "hybrid_sliding": 9}
    assert layer_windows(SimpleNamespace(layer_types=None, sliding_window=9)) == {}


def test_decoding_masks_cover_the_cache() -> None:
    step = decode_layout(5, 2, (1,), 2)
    mask = attention_masks(SINGLE, SimpleNamespace(sliding_window=4), step, 5, torch.float32)
    assert mask.shape == (1, 1, 4, 9)
    #                                       committed 0 … 4   c0 c1 m  m
    assert (mask[0, 0] == 0).int().tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0, 0],  # position 5
        [0, 0, 0, 1, 1, 1, 1, 0, 0],  # 6
        [0, 0, 0, 1, 1, 1, 0, 1, 1],  # 6, a mask slot
        [0, 0, 0, 0, 1, 1, 0, 1, 1],  # 7
    ]


def test_one_token_alone_needs_a_mask_only_where_a_window_binds() -> None:
    step = decode_layout(5, 1, (), 2)
    assert attention_masks(SINGLE, SimpleNamespace(sliding_window=None), step, 5, torch.float32) is None
    assert attention_masks(SINGLE, SimpleNamespace(sliding_window=6), step, 5, torch.float32) is None
    bound = attention_masks(SINGLE, SimpleNamespace(sliding_window=5), step, 5, torch.float32)
    assert (bound[0, 0] == 0).int().tolist() == [[0, 1, 1, 1, 1, 1]]


def test_every_family_has_a_route_that_its_masks_follow() -> None:
    config = SimpleNamespace(layer_types=["hybrid"], sliding_window=None)
    for family in FAMILIES.values():
        masks = attention_masks(family, config, ROW, 0, torch.float32)
        assert isinstance(masks, dict) == (family.mask_route == "layer_type")
