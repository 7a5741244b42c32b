"""Packed rows by tiles and by segments: the dense mask, and the dense attention of every family."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations import flex_attention as integration

from tests.contracts.families import INSTALLED, family_pair
from tests.contracts.models import MASK, random_ids
from zconvert.errors import UserError
from zconvert.tidar import packed_attention
from zconvert.tidar.layout import PADDING, PackedLayout, decode_layout, packed_layout
from zconvert.tidar.masks import EVERYTHING, Reach, visible
from zconvert.tidar.packed_attention import FLEX, SEGMENTS, PackedMask, mask_function, packed_mask, runs_of
from zconvert.tidar.settings import GatedParts
from zconvert.training.implementations import _flex_problem, _segments_problem, choose_attention
from zconvert.training.objective import hidden_halves
from zconvert.training.slots import draw_slots

REACHES = [EVERYTHING, Reach(window=1), Reach(window=5), Reach(window=21), Reach(chunk=8), Reach(chunk=6)]


def random_layouts(count: int) -> Iterator[PackedLayout]:
    """Rows of random documents, padding, block sizes and phases; lengths that tiles of 8 divide, and others."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for number in range(count):
        length = 32 if number % 2 else draw(1, 60)
        rows = []
        for _ in range(draw(1, 4)):
            breaks = torch.randint(8, (length,), generator=generator) == 0
            documents = breaks.long().cumsum(0)
            padding = draw(0, length) if number % 3 == 0 else 0
            documents[length - padding :] = PADDING
            rows.append(documents)
        block, documents = draw(1, 9), torch.stack(rows)
        offset = draw(0, block)
        slots = None
        if number % 4 == 3:  # some of the slots, in every other row of full tiles
            slots = draw_slots(documents, documents != PADDING, block, offset, 0.5, [generator] * len(documents))
        yield packed_layout(documents, block, offset, slots)


def dense(seen: Any, layout: PackedLayout) -> Tensor:
    """A mask function at every query and key: (R, N, N)."""
    rows, length = layout.position_ids.shape
    row, column = torch.arange(rows)[:, None, None], torch.arange(length)
    return seen(row, 0, column[:, None], column[None, :])  # type: ignore[no-any-return]


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_the_mask_function_sees_what_the_dense_mask_shows(reach: Reach) -> None:
    for layout in random_layouts(40):
        assert torch.equal(dense(mask_function(runs_of(layout, reach)), layout), visible(layout, layout, reach))


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_full_tiles_are_full_and_no_tile_is_missed(reach: Reach) -> None:
    kinds = {"full": 0, "partial": 0, "left out": 0}
    for layout in random_layouts(40):
        for start in (0, layout.first_slot or 0):  # the whole row, and its mask half by itself
            check_tiles(layout, reach, start, kinds)
    assert kinds["partial"] > 0
    assert kinds["left out"] > 0
    assert kinds["full"] > 0 or reach not in (EVERYTHING, Reach(window=21))


def check_tiles(layout: PackedLayout, reach: Reach, start: int, kinds: dict[str, int]) -> None:
    mask = packed_mask(layout, reach, tile=8, start=start)
    seen = visible(layout, layout, reach)[:, start:]
    rows, queries, length = seen.shape
    of_queries, of_keys = -(-queries // 8), -(-length // 8)
    padded = torch.zeros(rows, of_queries * 8, of_keys * 8, dtype=torch.bool)
    padded[:, :queries, :length] = seen
    by_tile = padded.view(rows, of_queries, 8, of_keys, 8).transpose(2, 3).flatten(3)
    partial = tiles_of(mask.kv_num_blocks, mask.kv_indices)
    full = tiles_of(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert by_tile[full].all()
    assert not (full & partial).any()
    assert torch.equal(full | partial, by_tile.any(-1)), "exactly the tiles in which something is seen"
    # A full tile that lies across the two halves counts as partial; no other does.
    half = layout.first_slot
    across = (torch.arange(of_keys) * 8 < half) & (torch.arange(1, of_keys + 1) * 8 > half)
    assert torch.equal(full | (by_tile.all(-1) & across), by_tile.all(-1))
    kinds["full"] += int(full.sum())
    kinds["partial"] += int(partial.sum())
    kinds["left out"] += int((~full & ~partial).sum())
    assert mask.shape == (rows, 1, queries, length)


def tiles_of(count: Tensor, which: Tensor) -> Tensor:
    """(R, 1, tiles) and (R, 1, tiles, tiles) -> (R, tiles, tiles) bool."""
    table = torch.zeros(which.shape, dtype=torch.bool)
    listed = torch.arange(which.shape[-1]) < count[..., None]
    return table.scatter(-1, which.long(), listed)[:, 0]


def test_the_tables_are_those_that_torch_makes_from_the_whole_mask() -> None:
    layout = packed_layout(torch.tensor([[0] * 150 + [1] * 106, [0] * 256]), 16)
    ours = packed_mask(layout, EVERYTHING)
    theirs = create_block_mask(ours.mask_mod, 2, 1, 512, 512, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.sparsity() == theirs.sparsity() > 40


PACKED = [name for name in INSTALLED if _segments_problem(family_pair(name).layout) is None]
IN_FLEX = [name for name in PACKED if _flex_problem(family_pair(name).layout) is None]
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 11, [0] * 20 + [PADDING] * 4])
IDS = torch.cat([random_ids((2, 24), seed=3), torch.full((2, 24), MASK)], dim=1)


def test_the_families_that_packed_masks_are_not_for() -> None:
    segments = {name: _segments_problem(family_pair(name).layout) for name in INSTALLED if name not in PACKED}
    assert segments["deepseek_v32"] == "an indexer chooses its keys"
    flex = {name: _flex_problem(family_pair(name).layout) for name in PACKED if name not in IN_FLEX}
    assert {**flex, **segments}["gemma2"] in ("gemma2 has eager attention alone", "its attention caps scores")
    assert flex["gpt_oss"] == "its attention has sinks"
    assert "bias by distance" in str(flex["inkling_text"])
    assert "latent" in str(flex["deepseek_v3"])
    assert {"zaya", "qwen3_moe", "mixtral", "gemma4_text", "llama4_text", "lfm2_moe"} <= set(IN_FLEX)


def uncompiled(*states: Tensor, training: bool, **options: Any) -> Any:
    return flex_attention(*states, **options)


@pytest.mark.parametrize(
    ("implementation", "family"),
    [*((FLEX, family) for family in IN_FLEX), *((SEGMENTS, family) for family in PACKED)],
)
@torch.no_grad()
def test_packed_attention_gives_the_states_of_the_dense_mask(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not compiled: it is the mask that is compared, and compiling takes half a minute.
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(packed_attention, "SEGMENT", 10)
    model = deepcopy(family_pair(family).layout)
    layout = packed_layout(DOCUMENTS, 4, offset=1)
    expected = model.hidden_states(IDS, layout)
    masks: list[Any] = []
    for name in ("attend_by_tiles", "attend_by_segments"):
        stock = getattr(packed_attention, name)

        def spy(*args: Any, _stock: Any = stock, **options: Any) -> Any:
            masks.append(options.get("attention_mask", args[-1]))
            return _stock(*args, **options)

        monkeypatch.setattr(packed_attention, name, spy)
    packed_attention.register()
    model.config._attn_implementation = implementation
    found = model.hidden_states(IDS, layout)
    assert masks
    model.add_gated(GatedParts(rank=1, mlp="none", mask_embedding=False))  # starts as the source, in two forwards
    halves = torch.cat(hidden_halves(model, *IDS.chunk(2, dim=1), layout), dim=1)
    for states in (found, halves):
        torch.testing.assert_close(states, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert all(isinstance(mask, PackedMask) for mask in masks)


@pytest.mark.parametrize("family", ["zaya", "mixtral", "gemma4_text", "gpt_oss", "deepseek_v3", "inkling_text"])
def test_segments_give_the_gradients_of_the_dense_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "SEGMENT", 10)
    packed_attention.register()
    model = deepcopy(family_pair(family).layout)
    weights = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for wanted in (None, "sdpa"):
        if wanted is not None:
            assert choose_attention(model, "sdpa", torch.device("cpu")) == "attention: SDPA by segments"
        model.model.zero_grad()
        (model.hidden_states(IDS, packed_layout(DOCUMENTS, 4)) * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.model.named_parameters() if p.grad is not None})
    dense, segments = gradients
    assert dense.keys() == segments.keys()
    total = torch.stack([gradient.norm() for gradient in dense.values()]).norm()
    for name, gradient in dense.items():
        assert (segments[name] - gradient).norm() <= 5e-5 * max(gradient.norm(), 1e-2 * total), name


def test_a_segment_takes_the_keys_that_it_sees_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "SEGMENT", 4)
    mask = packed_mask(packed_layout(torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]), 2), EVERYTHING)
    found = [(s.queries.start, *((k.start, k.stop) for k in s.keys)) for s in mask.segments(torch.float32)]
    assert found == [
        *[(0, (0, 4), (0, 0)), (4, (0, 8), (0, 0)), (8, (5, 10), (0, 0))],
        *[(10, (0, 2), (10, 14)), (14, (0, 7), (14, 19)), (18, (5, 9), (17, 20))],
    ]


def test_layouts_of_decoding_and_plain_forwards_still_have_masks_of_their_own() -> None:
    pair = family_pair("mixtral")
    model = deepcopy(pair.layout)
    choose_attention(model, "sdpa", torch.device("cpu"))
    ids = random_ids((1, 12), seed=3)
    with torch.no_grad():
        expected = pair.plain(ids).logits
        torch.testing.assert_close(model.model(ids).logits, expected, rtol=0, atol=1e-5)
        layout = decode_layout(0, 12, (), 4)
        torch.testing.assert_close(model.logits(model.hidden_states(ids, layout)), expected, rtol=0, atol=1e-5)


def test_flex_attention_that_cannot_be_had_is_refused_and_not_chosen_by_itself() -> None:
    model = deepcopy(family_pair("mixtral").layout)
    with pytest.raises(UserError, match="FlexAttention"):
        choose_attention(model, "flex", torch.device("cpu"))
    assert "segments" in choose_attention(model, "auto", torch.device("cpu"))
    with_sinks = deepcopy(family_pair("gpt_oss").layout)
    with pytest.raises(UserError, match="sinks"):
        choose_attention(with_sinks, "flex", torch.device("cuda"))
    line = choose_attention(with_sinks, "auto", torch.device("cuda"))
    assert line == "attention: SDPA by segments (not FlexAttention: its attention has sinks)"
    with_indexer = family_pair("deepseek_v32").layout
    line = choose_attention(with_indexer, "auto", torch.device("cuda"))
    assert "whole row's mask (not FlexAttention: an indexer chooses its keys)" in line
    assert choose_attention(model, "auto", torch.device("cuda")) == "attention: FlexAttention"
    assert model.config._attn_implementation == FLEX
    assert "segments" in choose_attention(model, "sdpa", torch.device("cuda"))
