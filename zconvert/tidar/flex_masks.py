"""Packed rows in FlexAttention: the mask as two runs of keys for each query, and the table of tiles made from them.

In a packed row the keys that a token sees stand in two runs of columns: clean tokens of its document, and the slots of
its own block (none for a clean token). Windows and chunks shorten the runs. So one function of four tensors is the mask
of every kind of layer, compiled once, and which tiles are empty, full or between is counted from the runs' ends, without
ever making the mask itself: (2T / 128)² numbers instead of (2T)².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask

from .families import Family
from .layout import Layout
from .masks import Reach, route

NAME = "layout_flex"
"""of the attention implementation, in transformers' registry"""
TILE = 128
"""queries and keys of a tile"""


@dataclass(frozen=True)
class Runs:
    """Which columns each query sees, (R, N) int32 each: `first … end - 1`, and `own_first … own_end - 1`."""

    first: Tensor
    end: Tensor
    own_first: Tensor
    own_end: Tensor

    def seen(self, row: Any, head: Any, query: Any, key: Any) -> Any:
        """FlexAttention's mask function."""
        clean = (key >= self.first[row, query]) & (key < self.end[row, query])
        return clean | ((key >= self.own_first[row, query]) & (key < self.own_end[row, query]))


def runs_of(layout: Layout, reach: Reach) -> Runs:
    """The runs of a packed row.

    Args:
        layout: of `packed_layout`: clean tokens first, each document's next to each other, then the slots.
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


def block_mask(layout: Layout, reach: Reach, tile: int = TILE) -> BlockMask:
    """The mask of one kind of layer.

    Args:
        layout: of `packed_layout`, (R, N).
        reach: of the layer.
        tile: queries and keys of a tile.

    Returns:
        For R rows, any head, N queries and N keys. A tile is full where every query sees every key of it in one run;
        tiles where nobody sees anything are left out.
    """
    runs = runs_of(layout, reach)
    partly, wholly = _tiles(runs.first, runs.end, tile), _tiles(runs.own_first, runs.own_end, tile)
    full = partly[1] + wholly[1] == tile
    some = (partly[0] + wholly[0] > 0) & ~full
    return BlockMask.from_kv_blocks(
        *_ordered(some),
        *_ordered(full),
        BLOCK_SIZE=tile,
        mask_mod=runs.seen,
        seq_lengths=(layout.num_tokens, layout.num_tokens),
    )


def _tiles(first: Tensor, end: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """(R, tiles of queries, tiles of keys): how many queries see some of a tile's keys, and how many see all."""
    touched = _count(first // tile, torch.where(end > first, (end - 1) // tile + 1, 0), tile)
    return touched, _count((first + tile - 1) // tile, end // tile, tile)


def _count(first: Tensor, end: Tensor, tile: int) -> Tensor:
    """How many queries of each tile have each tile of keys in their run, by adding up where runs begin and end."""
    rows, length = first.shape
    tiles = -(-length // tile)
    changes = torch.zeros(rows, tiles * (tiles + 1), dtype=torch.int32, device=first.device)
    line = torch.arange(length, device=first.device) // tile * (tiles + 1)
    some = (end > first).int()
    changes.scatter_add_(1, (line + torch.where(some > 0, first, 0)).long(), some)
    changes.scatter_add_(1, (line + torch.where(some > 0, end, 0)).long(), -some)
    return changes.view(rows, tiles, tiles + 1).cumsum(-1)[..., :tiles]


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """(R, tiles, tiles) bool -> how many of each line are set, and which, these first; one head."""
    which = table.int().argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32).unsqueeze(1), which.int().unsqueeze(1).contiguous()


def block_masks(family: Family, config: Any, layout: Layout) -> Any:
    """The `attention_mask` argument of a forward over a packed row: one mask, or one for each kind of layer."""
    return route(family, config, layout.num_tokens, lambda reach: block_mask(layout, reach))


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """An attention function of transformers: FlexAttention, which autocast does not know, in autocast's number format."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (states.to(dtype) for states in (query, key, value))
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


def register() -> None:
    """Makes the implementation known to transformers; again is once."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, flex_attention_mask)
