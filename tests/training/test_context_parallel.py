"""What one of several processes that share rows has to see, without the others: layouts and masks."""

from __future__ import annotations

import pytest
import torch

from zconvert.tidar.layout import PADDING, packed_layout
from zconvert.tidar.masks import EVERYTHING, Reach, visible
from zconvert.tidar.packed_attention import mask_function, mask_of
from zconvert.training.context_parallel import ContextParallel, Shard
from zconvert.training.slots import draw_slots

LENGTH = 48
DOCUMENTS = torch.stack(
    [
        torch.tensor([0] * 11 + [1] * 2 + [2] * 35),
        torch.tensor([0] * 29 + [1] * 12 + [PADDING] * 7),
        torch.tensor([0] * LENGTH),
    ]
)


@pytest.mark.parametrize("fraction", [1.0, 0.4], ids=["all slots", "some slots"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("reach", [EVERYTHING, Reach(window=5), Reach(chunk=8)], ids=str)
def test_the_runs_of_a_shard_are_what_its_queries_see_of_the_gathered_keys(
    size: int, reach: Reach, fraction: float
) -> None:
    generators = [torch.Generator().manual_seed(row) for row in range(len(DOCUMENTS))]
    slots = None if fraction == 1 else draw_slots(DOCUMENTS, DOCUMENTS != PADDING, 5, 2, fraction, generators)
    layout = packed_layout(DOCUMENTS, 5, 2, slots)
    everybody = visible(layout, layout, reach)
    seen_in_all = torch.zeros_like(everybody)
    for rank in range(size):
        shard = ContextParallel(None, rank, size).shard(layout)
        rows, queries = shard.columns.shape
        keys = shard.key.num_tokens
        runs = shard.runs(reach)
        mask = mask_of(runs, keys, shard.num_clean, tile=8)
        assert mask.shape == (rows, 1, queries, keys)
        row, query = torch.arange(rows)[:, None, None], torch.arange(queries)[:, None]
        found = mask_function(runs)(row, 0, query, torch.arange(keys))
        real = shard.is_real[:, :, None]
        assert torch.equal(found & real, visible(shard.layout, shard.key, reach) & real)
        assert found.any(-1).all(), "a query that sees nothing has no softmax"
        # And in terms of the whole rows: every query of the rows is somebody's, and sees what it saw there.
        place = torch.cat([torch.arange(LENGTH).expand(rows, -1), shard.columns[:, shard.num_clean :]], dim=1)
        there = torch.zeros(rows, queries, layout.num_tokens, dtype=torch.bool)
        there.scatter_(2, place[:, None].expand(-1, queries, -1), found & real & _real_keys(shard)[:, None])
        seen_in_all.scatter_(1, shard.columns[..., None].expand_as(there), _or(seen_in_all, shard.columns, there))
    # What fills rows up is nobody's, and seen by nobody else.
    fills = layout.block_ids == LENGTH
    assert torch.equal(seen_in_all, everybody & ~fills[:, :, None])
    assert fills.any() == (fraction < 1)


def test_what_stands_before_a_slot_is_found_whichever_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = [torch.Generator().manual_seed(row) for row in range(len(DOCUMENTS))]
    slots = draw_slots(DOCUMENTS, DOCUMENTS != PADDING, 5, 2, 0.4, generators)
    layout = packed_layout(DOCUMENTS, 5, 2, slots)
    numbers = torch.arange(1, 1 + LENGTH).expand(len(DOCUMENTS), -1)  # a token's state: its place in the row, from 1
    shards = [ContextParallel(None, rank, 3).shard(layout) for rank in range(3)]
    everyone = torch.stack([shard.of_clean(numbers) for shard in shards])[..., None].float()
    monkeypatch.setattr(ContextParallel, "gather", lambda _context, _states: everyone)
    for shard, states in zip(shards, everyone, strict=True):
        found, real = shard.before_slots(states)[..., 0], shard.layout.document_ids[:, shard.num_clean :] >= 0
        assert torch.equal(found[real].long(), shard.of_slots(slots)[real]), "the token before place i has number i"


def _real_keys(shard: Shard) -> torch.Tensor:
    is_real = shard.is_real
    return torch.cat([torch.ones(len(is_real), LENGTH, dtype=torch.bool), is_real[:, shard.num_clean :]], dim=1)


def _or(whole: torch.Tensor, columns: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return whole.gather(1, columns[..., None].expand_as(part)) | part
