"""Attention over packed rows that skips what nobody sees: FlexAttention by tiles, SDPA by segments of queries.

In a packed row the keys that a token sees stand in two runs of columns: clean tokens of its document, and the slots of
its own block (none for a clean token). Windows and chunks shorten the runs. From the runs' ends follow

- one mask function of four tensors for every kind of layer, which FlexAttention compiles once, and which of its tiles
  are empty, full or between: (2T / 128)² numbers are made, and never the (2T)² of the mask itself;
- which keys a segment of queries needs at all, so that SDPA runs once for each segment on these alone. Of the row's 4T²
  pairs about 1.4T² are computed, where a causal text of the same length has 2T².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, flex_attention_mask

from .families import Family
from .layout import PackedLayout
from .masks import Reach, additive, route
from .sinks import attend, sdpa_with_sinks

FLEX, SEGMENTS = "packed_flex", "packed_sdpa"
"""names of the two implementations, in transformers' registry"""
TILE = 128
"""queries and keys of a tile of FlexAttention"""
SEGMENT = 256
"""queries that go through SDPA together"""


@dataclass(frozen=True)
class Runs:
    """Which columns each query sees, (R, N) int32 each: `first … end - 1`, and `own_first … own_end - 1`."""

    first: Tensor
    end: Tensor
    own_first: Tensor
    own_end: Tensor


def runs_of(layout: PackedLayout, reach: Reach) -> Runs:
    """The runs of a packed row.

    Args:
        layout: of (R, N).
        reach: of the layer.

    >>> from .layout import packed_layout
    >>> runs = runs_of(packed_layout(torch.zeros(1, 4, dtype=torch.long), block_size=2), Reach())
    >>> runs.end.tolist(), runs.own_first.tolist()
    ([[1, 2, 3, 4, 0, 0, 2, 2]], [[0, 0, 0, 0, 4, 4, 6, 6]])
    """
    masked, position, blocks = layout.is_masked, layout.position_ids, layout.block_ids
    index = torch.arange(layout.num_tokens, device=position.device).expand_as(position)
    # A block is named after the column of the clean token at its start.
    document = torch.where(masked, blocks - layout.clean_limit, index - position)
    first, end = document, document + layout.clean_limit
    change = torch.ones_like(masked)
    change[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    own_first = torch.where(change, index, 0).cummax(dim=1).values
    following = torch.where(change, index, layout.num_tokens).roll(-1, dims=1)
    following[:, -1] = layout.num_tokens
    own_end = following.flip(1).cummin(dim=1).values.flip(1)
    if reach.window is not None:
        first = torch.maximum(first, document + position - reach.window + 1)
        own_first = torch.maximum(own_first, index - reach.window + 1)
    if reach.chunk is not None:
        into = position % reach.chunk
        first = torch.maximum(first, document + position - into)
        end = torch.minimum(end, document + position - into + reach.chunk)
        own_first = torch.maximum(own_first, index - into)
        own_end = torch.minimum(own_end, index - into + reach.chunk)
    own_first, own_end = (torch.where(masked, column, 0) for column in (own_first, own_end))
    return Runs(*(column.int().contiguous() for column in (first, end, own_first, own_end)))


def mask_function(runs: Runs) -> Callable[[Any, Any, Any, Any], Any]:
    """FlexAttention's mask function: a row, any head, a query and a key -> whether it is seen."""
    first, end, own_first, own_end = runs.first, runs.end, runs.own_first, runs.own_end

    def seen(row: Any, head: Any, query: Any, key: Any) -> Any:
        clean = (key >= first[row, query]) & (key < end[row, query])
        return clean | ((key >= own_first[row, query]) & (key < own_end[row, query]))

    return seen


class PackedMask(BlockMask):
    """A `BlockMask`, which all models of transformers hand on untouched, that knows the runs it was made from."""

    runs: Runs
    """of the row"""
    first_slot: int
    """the query where the slots begin"""
    _segments: list[Segment] | None = None

    def segments(self, dtype: torch.dtype) -> list[Segment]:
        """The row in segments of queries, made once."""
        if self._segments is None:
            self._segments = _segments(self.runs, self.first_slot, dtype)
        return self._segments


@dataclass(frozen=True)
class Segment:
    """Some queries side by side, and the keys that they see."""

    queries: slice
    keys: tuple[slice, slice]
    """columns of clean tokens, and of slots"""
    bias: Tensor
    """(R, 1, queries, keys): 0 where seen, the dtype's lowest number elsewhere"""


def _segments(runs: Runs, first_slot: int, dtype: torch.dtype) -> list[Segment]:
    rows, length = runs.first.shape
    seen = mask_function(runs)
    row = torch.arange(rows, device=runs.first.device)[:, None, None]
    starts = [*range(0, first_slot, SEGMENT), *range(first_slot, length, SEGMENT)]
    segments = []
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        queries = slice(start, stop)
        keys = (_hull(runs.first, runs.end, queries), _hull(runs.own_first, runs.own_end, queries))
        columns = torch.cat([torch.arange(k.start, k.stop, device=row.device) for k in keys])
        query = torch.arange(start, stop, device=row.device)[:, None]
        segments.append(Segment(queries, keys, additive(seen(row, 0, query, columns), dtype)))
    return segments


def _hull(first: Tensor, end: Tensor, queries: slice) -> slice:
    """The columns from the first to the last that any of the queries sees in a run."""
    first, end = first[:, queries], end[:, queries]
    some = end > first
    if not some.any():
        return slice(0, 0)
    return slice(int(first[some].min()), int(end[some].max()))


def packed_mask(layout: PackedLayout, reach: Reach, tile: int = TILE, start: int = 0) -> PackedMask:
    """The mask of one kind of layer.

    Args:
        layout: of (R, N).
        reach: of the layer.
        tile: queries and keys of a tile.
        start: column of the first query; T where the mask half attends by itself.

    Returns:
        For R rows, any head, N - start queries and N keys. A tile is full where every query sees every key of it in one
        run; tiles where nobody sees anything are left out.
    """
    whole = runs_of(layout, reach)
    runs = Runs(*(getattr(whole, field.name)[:, start:].contiguous() for field in fields(Runs)))
    first_slot = layout.num_tokens if layout.first_slot is None else layout.first_slot
    return mask_of(runs, layout.num_tokens, first_slot - start, tile)


def mask_of(runs: Runs, num_keys: int, first_slot: int, tile: int = TILE) -> PackedMask:
    """The mask of queries that see runs of keys.

    Args:
        runs: (R, N), in columns of the keys.
        num_keys: K.
        first_slot: the query where the mask slots begin, behind the clean tokens.
        tile: queries and keys of a tile.
    """
    keys = -(-num_keys // tile)
    clean, own = _tiles(runs.first, runs.end, tile, keys), _tiles(runs.own_first, runs.own_end, tile, keys)
    full = clean[1] + own[1] == tile
    some = (clean[0] + own[0] > 0) & ~full
    mask = PackedMask.from_kv_blocks(
        *_ordered(some),
        *_ordered(full),
        BLOCK_SIZE=tile,
        mask_mod=mask_function(runs),
        seq_lengths=(runs.first.shape[1], num_keys),
    )
    mask.runs, mask.first_slot = runs, first_slot
    return mask


def _tiles(first: Tensor, end: Tensor, tile: int, keys: int) -> tuple[Tensor, Tensor]:
    """(R, tiles of queries, tiles of keys): how many queries see some of a tile's keys, and how many see all."""
    touched = _count(first // tile, torch.where(end > first, (end - 1) // tile + 1, 0), tile, keys)
    return touched, _count((first + tile - 1) // tile, end // tile, tile, keys)


def _count(first: Tensor, end: Tensor, tile: int, keys: int) -> Tensor:
    """How many queries of each tile have each of the tiles of keys in their run: adds up where runs begin and end."""
    rows, length = first.shape
    tiles = -(-length // tile)
    changes = torch.zeros(rows, tiles * (keys + 1), dtype=torch.int32, device=first.device)
    line = torch.arange(length, device=first.device) // tile * (keys + 1)
    some = (end > first).int()
    changes.scatter_add_(1, (line + torch.where(some > 0, first, 0)).long(), some)
    changes.scatter_add_(1, (line + torch.where(some > 0, end, 0)).long(), -some)
    return changes.view(rows, tiles, keys + 1).cumsum(-1)[..., :keys]


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """(R, tiles, tiles) bool -> how many of each line are set, and which, these first; one head."""
    which = table.int().argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32).unsqueeze(1), which.int().unsqueeze(1).contiguous()


def packed_masks(family: Family, config: Any, layout: PackedLayout, start: int = 0) -> Any:
    """The `attention_mask` argument of a forward over a packed row: one mask, or one for each kind of layer.

    Args:
        family: the model's row of the family table.
        config: the model's transformers config.
        layout: of the whole row.
        start: column of the first query.
    """
    tile = TILE if config._attn_implementation == FLEX else layout.num_tokens  # SDPA has no use for the table
    return route(family, config, layout.num_tokens, lambda reach: packed_mask(layout, reach, tile, start))


def attend_by_tiles(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """An attention function of transformers: FlexAttention, in autocast's number format, which it does not know."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (states.to(dtype) for states in (query, key, value))
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


def attend_by_segments(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> Any:
    """An attention function of transformers: SDPA of each segment of queries with the keys that it sees."""
    if not isinstance(attention_mask, PackedMask):
        whole = sdpa_with_sinks if "s_aux" in options else sdpa_attention_forward
        return whole(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)

    def part(states: Tensor, keys: tuple[slice, slice]) -> Tensor:
        clean, own = (states[:, :, columns] for columns in keys)
        return torch.cat([clean, own], dim=2) if own.shape[2] else clean

    by_distance = options.get("position_bias")  # of positions.py
    outputs = []
    for segment in attention_mask.segments(query.dtype):
        bias = segment.bias
        if by_distance is not None:
            bias = bias + by_distance.of(segment.queries, segment.keys).to(bias.dtype)
        keys, values = part(key, segment.keys), part(value, segment.keys)
        queries, dropout = query[:, :, segment.queries], options.get("dropout", 0.0)
        output = attend(queries, keys, values, bias, options.get("s_aux"), dropout, options.get("scaling"))
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def register() -> None:
    """Makes both implementations known to transformers; again is once."""
    AttentionInterface.register(FLEX, attend_by_tiles)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)
    AttentionInterface.register(SEGMENTS, attend_by_segments)
    AttentionMaskInterface.register(SEGMENTS, eager_mask)  # the one that stock eager attention takes too: see sinks.py
