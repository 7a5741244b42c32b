"""The texts under way in an engine, and the drafts that each of them has to verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .acceptance import Drafts, Sampling
from .decoding import Result


@dataclass(eq=False)
class Row:
    """A text under way. The engine keeps rows in the order of the cache's."""

    result: Result
    sampling: Sampling
    eos_token_ids: frozenset[int]
    generator: torch.Generator | None  # on the CPU: the same numbers on every device
    prompt: list[int]  # what of it is not in the cache yet: not empty while it is read
    left: int  # tokens still wanted
    next_token: int = 0
    drafted: tuple[Drafted, int] | None = None  # drafts to verify: a batch of them, and the row's place in it
    num_drafts: int = 0
    first_slot: int = 0  # of its block that the first draft came from
    seen: Tensor | None = None  # (V,) bool, with a repetition penalty

    def uniform(self, count: int) -> Tensor:
        """(count,) numbers. How many are drawn must depend on this row alone."""
        return torch.rand(count, generator=self.generator, dtype=torch.double)


@dataclass(frozen=True, eq=False)
class Drafted:
    """Drafts of the rows that choose tokens alike."""

    rows: list[Row]
    drafts: Drafts


def batches(rows: Sequence[Row]) -> list[tuple[Drafted | None, list[int], list[int]]]:
    """Rows by the batch that their drafts were made in: the batch, which rows, and their places in the batch.

    Rows without drafts go by how they choose tokens.
    """
    groups: dict[object, tuple[Drafted | None, list[int], list[int]]] = {}
    for index, row in enumerate(rows):
        batch, place = row.drafted if row.drafted is not None else (None, 0)
        group = groups.setdefault(row.sampling if batch is None else batch, (batch, [], []))
        group[1].append(index)
        group[2].append(place)
    return list(groups.values())


def chosen(drafts: Drafts, places: list[int], count: int) -> Drafts:
    """Some rows of drafts, and their first columns."""
    if places == list(range(len(drafts.tokens))):
        if count == drafts.tokens.shape[1]:
            return drafts
        places_or_all: list[int] | slice = slice(None)
    else:
        places_or_all = places
    return Drafts(
        drafts.tokens[places_or_all, :count],
        drafts.counts[places_or_all],
        None if drafts.probs is None else drafts.probs[places_or_all, :count],
        None if drafts.logits is None else drafts.logits[places_or_all, :count],
    )
