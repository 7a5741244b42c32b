"""What every token of a forward is: its position, what it may see, and which token precedes it. Pure tensors.

A forward, in training or in decoding, is a row of tokens of two kinds. *Clean* tokens are text. *Mask slots* hold the
mask token and predict, several at once, the text at their positions. One `Layout` says all that the rest needs to know
of them, so that masks (masks.py) and convolutions (cca.py) follow one rule in training and decoding alike:

    a token sees the clean tokens of its document at positions below its `clean_limit`,
    and, if it is a mask slot, the mask slots of its own block.

Source: TiDAR (arXiv 2511.08923), section 3; the predecessor index is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

PADDING = -1  # document id of padding: it forms a document of its own, never scored
CLEAN = -1  # block id of clean tokens
NO_PREDECESSOR = -1
NO_SLOT = -1  # fills up rows that have fewer mask slots than others


@dataclass(frozen=True)
class Layout:
    """R rows of N tokens; every field is an int64 tensor of shape (R, N)."""

    position_ids: Tensor
    """place in the document, from 0"""
    clean_limit: Tensor
    """the token sees clean tokens at positions below this"""
    block_ids: Tensor
    """diffusion block of a mask slot, unique in its row; CLEAN for clean tokens"""
    document_ids: Tensor
    """nothing is seen across documents; PADDING for padding"""
    predecessors: Tensor
    """index in the row of the previous token of the text; NO_PREDECESSOR at the start of the row's text"""

    @property
    def is_masked(self) -> Tensor:
        """(R, N) bool: the token is a mask slot."""
        return self.block_ids != CLEAN

    @cached_property
    def first_slot(self) -> int | None:
        """The column where the mask slots begin, which stand behind all clean tokens; None where there are none."""
        clean = int((self.block_ids[0] == CLEAN).sum())
        return clean if clean < self.num_tokens else None

    @property
    def num_tokens(self) -> int:
        """N, tokens in a row."""
        return self.position_ids.shape[1]


@dataclass(frozen=True)
class PackedLayout(Layout):
    """A training row: clean tokens, each document's side by side, then mask slots, each block's side by side.

    A block's id is the column of the clean token that its first slot stands for.
    """

    def halves(self) -> tuple[PackedLayout, Layout]:
        """The clean tokens by themselves, and the mask slots, whose predecessors still are columns of the whole row."""
        clean = [getattr(self, field.name)[:, : self.first_slot] for field in fields(self)]
        return PackedLayout(*clean), Layout(*(getattr(self, f.name)[:, self.first_slot :] for f in fields(self)))


def packed_layout(
    document_ids: Tensor, block_size: int, offset: Tensor | int = 0, slots: Tensor | None = None
) -> PackedLayout:
    """Lays out a packed training row `[x_0 … x_{T-1} | m_0 … m_{T-1}]`.

    With T = 4, B = 2 and one document, a dot being hidden:

        keys: x0 x1 x2 x3 | m0 m1 m2 m3
        x0     1  .  .  . |  .  .  .  .
        x1     1  1  .  . |  .  .  .  .
        x2     1  1  1  . |  .  .  .  .
        x3     1  1  1  1 |  .  .  .  .
        m0     .  .  .  . |  1  1  .  .
        m1     .  .  .  . |  1  1  .  .
        m2     1  1  .  . |  .  .  1  1
        m3     1  1  .  . |  .  .  1  1

    Args:
        document_ids: (R, T) int64; a document is a run of equal ids, PADDING marks padding.
        block_size: B, mask slots in a block; the last block of a document may be shorter.
        offset: phase of the blocks, in 0 … B-1: slot i of a document lies in block (i + offset) // B. One number, or
            (R, T) equal within each document.
        slots: (R, M) int64, the tokens that have a mask slot, in order and by whole blocks; NO_SLOT fills rows up from
            behind. None: all of them, M = T.

    Returns:
        PackedLayout of (R, T + M).

    >>> packed_layout(torch.tensor([[0, 0, 0, 1, 1]]), 2).position_ids.tolist()
    [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1]]
    """
    rows, length = document_ids.shape
    index = torch.arange(length, device=document_ids.device).expand(rows, length)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    document_start = torch.where(starts, index, 0).cummax(dim=1).values  # (R, T)
    position = index - document_start
    # Position in its document of the first slot of each slot's block.
    block_start = ((position + offset) // block_size * block_size - offset).clamp_min(0)

    clean_before = torch.where(position > 0, index - 1, NO_PREDECESSOR)
    before_block = torch.where(block_start > 0, document_start + block_start - 1, NO_PREDECESSOR)
    # Of each slot: position, limit, block, document, and what precedes its block's first slot. The row index of a
    # block's first token names it uniquely in the row.
    of_slot: tuple[Tensor, ...] = (position, block_start, document_start + block_start, document_ids, before_block)
    if slots is not None:
        of_slot = _kept(slots, of_slot)
    slot_position, limit, block, document, before = of_slot
    column = length + torch.arange(slot_position.shape[1], device=position.device)
    return PackedLayout(
        position_ids=torch.cat([position, slot_position], dim=1),
        clean_limit=torch.cat([position + 1, limit], dim=1),
        block_ids=torch.cat([torch.full_like(index, CLEAN), block], dim=1),
        document_ids=torch.cat([document_ids, document], dim=1),
        predecessors=torch.cat([clean_before, torch.where(slot_position == limit, before, column - 1)], dim=1),
    )


def _kept(slots: Tensor, of_slot: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Takes some slots of a row's T; what fills up is one more block, of padding, that sees itself alone."""
    fill, length = slots == NO_SLOT, of_slot[0].shape[1]
    rank = (fill.long().cumsum(dim=1) - 1).clamp_min(0)
    filling: tuple[Any, ...] = (rank, 0, length, PADDING, NO_PREDECESSOR)
    at = slots.clamp_min(0)
    return tuple(torch.where(fill, x, values.gather(1, at)) for x, values in zip(filling, of_slot, strict=True))


def decode_layout(
    committed: int | Sequence[int],
    num_causal: int,
    proposals: tuple[int, ...] | Sequence[tuple[int, ...]],
    block_size: int,
    device: torch.device | None = None,
) -> Layout:
    """Lays out one decoding forward `[c_0 … c_{m-1} | block for k_1 | block for k_2 …]` after `committed` tokens.

    The causal tokens are the next token and its drafts (or, in prefill, the prompt). The block for accepted count k
    has `block_size` mask slots at positions committed + k …, and sees the cache, the first k causal tokens and itself.
    With m = 3, B = 2, proposals (1, 3), the cache not drawn:

        keys: c0 c1 c2 | a0 a1 | b0 b1
        c0     1  .  . |  .  . |  .  .
        c1     1  1  . |  .  . |  .  .
        c2     1  1  1 |  .  . |  .  .
        a0     1  .  . |  1  1 |  .  .
        a1     1  .  . |  1  1 |  .  .
        b0     1  1  1 |  .  . |  1  1
        b1     1  1  1 |  .  . |  1  1

    Args:
        committed: L, tokens in the cache: a number for each row, or one number for one row.
        num_causal: m, at least 1. A row that has fewer is filled up from behind: nothing that counts sees the filling.
        proposals: accepted counts that get a block, each in 1 … m; the same for all rows, or as many for each row.
        block_size: B, mask slots in a block.
        device: where the tensors are made.

    Returns:
        Layout of (R, m + B · len(proposals)). NO_PREDECESSOR stands for the last committed token.

    >>> decode_layout(10, 3, (1, 3), 2).position_ids.tolist()
    [[10, 11, 12, 11, 12, 13, 14]]
    >>> decode_layout([10, 20], 2, [(2,), (1,)], 1).position_ids.tolist()
    [[10, 11, 12], [20, 21, 21]]
    """
    rows = [committed] if isinstance(committed, int) else list(committed)
    shared = not proposals or isinstance(proposals[0], int)
    if shared:
        table = _step_table(num_causal, proposals, block_size).unsqueeze(1)
    else:
        table = torch.stack([_step_table(num_causal, own, block_size) for own in proposals], dim=1)
    # (2, R, N): positions count from each row's border, everything else is the same wherever a row stands.
    moved = table[:2] + torch.tensor(rows)[:, None]
    fixed = table[2:].expand(-1, len(rows), -1)
    layout = Layout(*torch.cat([moved, fixed]).to(device, non_blocking=True).unbind(0))
    # Known here, so that nobody has to wait for the device to be told.
    vars(layout)["first_slot"] = num_causal if proposals and proposals[0] != () else None
    return layout


@lru_cache(maxsize=1024)
def _step_table(num_causal: int, proposals: tuple[int, ...], block_size: int) -> Tensor:
    """(5, N): the fields of a layout, with nothing committed. Kept: a decoding asks for the same few all along."""
    assert num_causal >= 1
    assert all(1 <= k <= num_causal for k in proposals), (num_causal, proposals)
    position = list(range(num_causal))
    limit = [p + 1 for p in position]
    block = [CLEAN] * num_causal
    before = list(range(-1, num_causal - 1))
    for k in proposals:
        first = len(position)
        position += range(k, k + block_size)
        limit += [k] * block_size
        block += [k] * block_size
        before += [k - 1, *range(first, first + block_size - 1)]
    return torch.tensor([position, limit, block, [0] * len(position), before])


def with_committed(layout: Layout, committed: int | Sequence[int], num_slots: int | None = None) -> Layout:
    """The keys of a decoding forward: the committed tokens in the cache, then the forward's own tokens.

    Args:
        layout: of the forward, (R, N).
        committed: tokens in the cache: a number for each row, or one for all.
        num_slots: slots of the cache that the forward sees; None: no more than it must.

    Returns:
        Layout of (R, longest + N) or (R, num_slots), in the order of the cache's slots; what stands behind a shorter
        row is no part of its document. Predecessors are left as they were: keys have no use for them.

    >>> step = decode_layout([1, 3], 1, (), 2)
    >>> keys = with_committed(step, [1, 3])
    >>> keys.document_ids.tolist()
    [[0, 0, -1, -1], [0, 0, 0, 0]]
    """
    rows, count = layout.position_ids.shape
    lengths = [committed] * rows if isinstance(committed, int) else list(committed)
    device, longest = layout.position_ids.device, max(lengths)
    cached = torch.arange(num_slots or longest + count, device=device)
    if lengths.count(longest) == rows and num_slots is None:
        cached = cached[:longest].expand(rows, -1)

        def join(values: Tensor, field: Tensor) -> Tensor:
            return torch.cat([values, field], dim=1)

        document = torch.zeros_like(cached)
    else:
        border = torch.tensor(lengths, device=device)[:, None]
        slots = border + torch.arange(count, device=device)
        document = (cached >= border + count).long() * PADDING
        cached = cached.expand(rows, -1)

        def join(values: Tensor, field: Tensor) -> Tensor:
            return values.scatter(1, slots, field)

    return Layout(
        position_ids=join(cached, layout.position_ids),
        clean_limit=join(cached + 1, layout.clean_limit),
        block_ids=join(torch.full_like(cached, CLEAN), layout.block_ids),
        document_ids=join(document, layout.document_ids),
        predecessors=layout.predecessors,
    )
