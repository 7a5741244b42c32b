"""How the blocks of mask slots lie in a row: their phases, and which tokens have a slot, where not all do.

All of it is drawn for each row by itself, from the run's seed and the row's number in the run, so that any process, and
a run that continues with another number of them, draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zconvert.tidar.layout import NO_SLOT, packed_layout


def row_generators(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """One generator for each row, by its number in the run."""
    digests = (hashlib.sha256(f"{seed}:{number}".encode()).digest() for number in numbers)
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]


def random_offsets(document_ids: Tensor, block_size: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Phases of the blocks of each document.

    Args:
        document_ids: (R, T) int64; a row's documents are numbered from 0.
        block_size: B.
        generators: one for each row.

    Returns:
        (R, T) int64 in 0 … B-1.
    """
    phases = torch.zeros_like(document_ids)
    for row, generator in enumerate(generators):
        drawn = torch.randint(block_size, (int(document_ids[row].max()) + 2,), generator=generator)
        phases[row] = drawn.to(document_ids.device)[document_ids[row]]  # padding, -1, takes the last
    return phases


def draw_slots(
    document_ids: Tensor,
    scored: Tensor,
    block_size: int,
    offset: Tensor | int,
    fraction: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draws whole blocks at random until a row's share of slots is full, of those with a token that is scored.

    So rows whose scored text is short (answers, say) may keep all of it at a fraction below 1: the slots left out there
    teach nothing. Every row has the same number of slots, whatever it holds.

    Args:
        document_ids: (R, T) int64; PADDING marks padding.
        scored: (R, T) bool: the mask slot of this token would be scored.
        block_size: B.
        offset: phase of the blocks; see `packed_layout`.
        fraction: slots per clean token, above 0 and at most 1.
        generators: one for each row, on the CPU.

    Returns:
        (R, M) int64, M being fraction · T and at least one block: the tokens, in order, then NO_SLOT.
    """
    rows, length = document_ids.shape
    count = min(length, max(block_size, round(fraction * length)))
    index = torch.arange(length, device=document_ids.device).expand(rows, length)
    block = packed_layout(document_ids, block_size, offset).block_ids[:, length:]  # the index of its first token
    nothing = torch.zeros_like(block)
    size = nothing.scatter_add(1, block, torch.ones_like(block))
    wanted = nothing.scatter_add(1, block, scored.long()) > 0
    draw = torch.stack([torch.rand(length, generator=generator) for generator in generators]).to(block.device)
    order = torch.where(wanted, draw, 2.0).argsort(dim=1)  # those that are not wanted come last
    fits = (torch.where(wanted, size, 0).gather(1, order).cumsum(dim=1) <= count) & wanted.gather(1, order)
    kept = torch.zeros_like(wanted).scatter(1, order, fits).gather(1, block)
    slots = torch.where(kept, index, length).sort(dim=1).values[:, :count]
    return torch.where(slots == length, NO_SLOT, slots)
