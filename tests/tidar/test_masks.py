"""Masks by route, with windows, in the form that every attention of transformers takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from zconvert.tidar.families import FAMILIES, Family
from zconvert.tidar.layout import Layout, decode_layout, packed_layout, with_committed
from zconvert.tidar.masks import EVERYTHING, Reach, additive, attention_masks, reach_of, visible

ROW = packed_layout(torch.zeros(1, 6, dtype=torch.long), 2)
LOWEST = torch.finfo(torch.float32).min
SINGLE = Family("any")
WINDOW = Family("any", masks="window")
LAYERED = Family("any", masks="layer_type")


def masks_of(family: Family, layout: Layout = ROW, committed: int = 0, **config: Any) -> Any:
    key = with_committed(layout, committed)
    return attention_masks(family, SimpleNamespace(**config), layout, key, torch.float32)


def test_a_window_counts_positions_in_both_halves() -> None:
    seen = visible(ROW, ROW, Reach(window=3))[0].int().tolist()
    assert seen[5] == [0, 0, 0, 1, 1, 1] + [0] * 6  # clean 5: 3, 4, 5
    #                      clean 0 … 5       slots 0 … 5; their block starts at 4
    assert seen[6 + 4] == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert seen[6 + 5] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert visible(ROW, ROW, Reach(window=1))[0, 6 + 5].int().tolist() == [0] * 11 + [1]


def test_a_window_as_long_as_the_text_hides_nothing() -> None:
    assert torch.equal(visible(ROW, ROW, Reach(window=6)), visible(ROW, ROW))


def test_additive_masks_are_zero_where_seen_and_the_lowest_number_elsewhere() -> None:
    seen = torch.tensor([[[True, False], [True, True]]])
    assert additive(seen, torch.float32).tolist() == [[[[0.0, LOWEST], [0.0, 0.0]]]]
    assert additive(seen, torch.bfloat16).dtype == torch.bfloat16


def test_one_mask_has_the_models_window_where_the_family_uses_it() -> None:
    for window in (None, 3):
        mask = masks_of(WINDOW, sliding_window=window)
        assert mask.shape == (1, 1, 12, 12)
        assert torch.equal(mask[:, 0] == 0, visible(ROW, ROW, Reach(window=window)))
        assert torch.equal(masks_of(SINGLE, sliding_window=window)[:, 0] == 0, visible(ROW, ROW))


def test_the_layer_type_route_gives_a_mask_for_each_layer_type() -> None:
    kinds = ["hybrid", "hybrid_sliding", "full_attention", "sliding_attention", "hybrid"]
    masks = masks_of(LAYERED, layer_types=kinds, sliding_window=3)
    assert sorted(masks) == sorted(set(kinds))
    for kind, mask in masks.items():
        window = 3 if "sliding" in kind else None
        assert torch.equal(mask[:, 0] == 0, visible(ROW, ROW, Reach(window=window))), kind
    assert masks["hybrid"] is masks["full_attention"], "the same mask is made once"


def test_a_chunk_starts_anew_at_its_multiples() -> None:
    seen = visible(ROW, ROW, Reach(chunk=4))[0].int().tolist()
    assert seen[3] == [1, 1, 1, 1, 0, 0] + [0] * 6
    assert seen[5] == [0, 0, 0, 0, 1, 1] + [0] * 6
    #                      clean 0 … 5       slots 0 … 5
    assert seen[6 + 2] == [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert seen[6 + 4] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_how_far_layers_see_comes_from_the_config() -> None:
    config = SimpleNamespace(sliding_window=9, attention_chunk_size=8)
    assert reach_of(config, "hybrid_sliding") == reach_of(config, "sliding_attention") == Reach(window=9)
    assert reach_of(config, "chunked_attention") == Reach(chunk=8)
    assert reach_of(config, "full_attention") == EVERYTHING
    assert reach_of(SimpleNamespace(sliding_window_size=5), "sliding_attention") == Reach(window=5)


def test_decoding_masks_cover_the_cache() -> None:
    step = decode_layout(5, 2, (1,), 2)
    mask = masks_of(WINDOW, step, 5, sliding_window=4)
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
    assert masks_of(WINDOW, step, 5, sliding_window=None) is None
    assert masks_of(WINDOW, step, 5, sliding_window=6) is None
    bound = masks_of(WINDOW, step, 5, sliding_window=5)
    assert (bound[0, 0] == 0).int().tolist() == [[0, 1, 1, 1, 1, 1]]


def test_a_sparse_indexer_gets_its_mask_even_where_nothing_is_hidden() -> None:
    step = decode_layout(5, 1, (), 2)
    assert masks_of(Family("any", indexed=True), step, 5).tolist() == [[[[0.0] * 6]]]


def test_every_family_has_a_route_that_its_masks_follow() -> None:
    for family in FAMILIES.values():
        masks = masks_of(family, layer_types=["hybrid"], sliding_window=None)
        assert isinstance(masks, dict) == (family.masks == "layer_type")
