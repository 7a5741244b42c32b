"""The contracts as functions: each returns the largest difference from what must hold, 0 being perfect.

Tests assert that it is small; mutations assert that a wrong mask, predecessor, position or cache makes it large.
What is wrong there is patched into `zconvert.tidar`, so these functions look names up in its modules when called.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.contracts.models import MASK, Pair, random_ids
from tests.contracts.reference import block_logits, causal_logits
from zconvert.tidar import layout as layouts
from zconvert.tidar.cache import TidarCache

TOLERANCE = 5e-5  # of logits around ±2 in float32
BLOCK = 4


@dataclass(frozen=True)
class PackedRow:
    """Documents side by side in one training row."""

    lengths: tuple[int, ...]
    """tokens of each document; together T"""
    offset: int = 0
    """phase of the blocks, the same in each document"""
    padding: int = 0
    """tokens of padding at the end"""

    @property
    def num_clean(self) -> int:
        """T, padding included."""
        return sum(self.lengths) + self.padding

    @property
    def ids(self) -> Tensor:
        """(T,) random text."""
        return random_ids((self.num_clean,), seed=3)

    @property
    def document_ids(self) -> Tensor:
        """(T,) for `packed_layout`."""
        runs = [torch.full((length,), i) for i, length in enumerate(self.lengths)]
        return torch.cat([*runs, torch.full((self.padding,), layouts.PADDING)])

    def documents(self) -> Iterator[slice]:
        """The clean tokens of each document."""
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length

    def blocks(self) -> Iterator[tuple[slice, int, int]]:
        """Every block: its document, and where in the document it starts and ends. By the definition, one at a time."""
        for document in self.documents():
            length = document.stop - document.start
            block_of = [(i + self.offset) // BLOCK for i in range(length)]
            for block in sorted(set(block_of)):
                yield document, block_of.index(block), length - block_of[::-1].index(block)

    def logits(self, pair: Pair, clean: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the row through layouts: clean logits (…, T, V) and mask logits (…, T, V) for ids (…, T)."""
        rows = clean if clean.dim() == 2 else clean[None]
        masks = torch.full_like(rows, MASK) if slots is None else slots.expand_as(rows)
        layout = layouts.packed_layout(self.document_ids.expand(len(rows), -1), BLOCK, self.offset)
        hidden = pair.layout.hidden_states(torch.cat([rows, masks], dim=1), layout)
        logits = pair.layout.logits(hidden).view(*clean.shape[:-1], 2 * self.num_clean, -1)
        return logits.split(self.num_clean, dim=-2)  # type: ignore[return-value]


ROWS = {
    "one document": PackedRow((24,)),
    "short last block": PackedRow((23,)),
    "several documents": PackedRow((9, 1, 14)),
    "offset 1": PackedRow((24,), offset=1),
    "offset 3 in several documents": PackedRow((10, 2, 12), offset=3),
    "padding": PackedRow((11, 8), offset=2, padding=5),
}


@torch.no_grad()
def clean_logits_differ(pair: Pair, row: PackedRow) -> float:
    """(a) Clean logits of the packed row = plain causal logits of each document alone."""
    clean, _ = row.logits(pair, row.ids)
    return max(_difference(clean[doc], causal_logits(pair.plain, row.ids[doc])) for doc in row.documents())


@torch.no_grad()
def clean_logits_see_mask_slots(pair: Pair, row: PackedRow) -> float:
    """(b) Changing what stands in the mask slots leaves clean logits alone."""
    expected, slots = row.logits(pair, row.ids)
    changed, changed_slots = row.logits(pair, row.ids, random_ids((row.num_clean,), seed=4))
    assert _difference(slots, changed_slots) > 0.1, "the change itself must be felt"
    return _difference(changed, expected)


@torch.no_grad()
def mask_logits_differ(pair: Pair, row: PackedRow) -> float:
    """(c) Mask logits of a block = those of its document's text before it and that block, run alone."""
    _, masked = row.logits(pair, row.ids)
    worst = 0.0
    for document, start, end in row.blocks():
        text = row.ids[document]
        expected = block_logits(pair.plain, text[:start], end - start)
        worst = max(worst, _difference(masked[document][start:end], expected))
    return worst


@torch.no_grad()
def labels_leak(pair: Pair, row: PackedRow) -> float:
    """No leak: mask logits of a block depend on nothing but its own document's clean tokens before the block."""
    _, expected = row.logits(pair, row.ids)
    blocks = list(row.blocks())
    texts = random_ids((len(blocks), row.num_clean), seed=5)
    for text, (document, start, _) in zip(texts, blocks, strict=True):
        text[document.start : document.start + start] = row.ids[document.start : document.start + start]
    _, changed = row.logits(pair, texts)
    return max(
        _difference(logits[document][start:end], expected[document][start:end])
        for logits, (document, start, end) in zip(changed, blocks, strict=True)
    )


ACCEPTED = (3, 1, 4, 2)  # of 4, in turn
PROMPT = 10  # past the window


@torch.no_grad()
def cached_steps_differ(
    pair: Pair, accepted: tuple[int, ...] = ACCEPTED, proposals: tuple[int, ...] = (1, 2, 3, 4), prompt: int = PROMPT
) -> float:
    """(d) Cached decoding steps with scripted acceptance = the same tokens without a cache.

    Each step runs the next token and three drafts, random here, and a block for each count in `proposals`. Plain
    transformers then runs the text so far with the drafts, and the text up to each count with a block after it.
    """
    text = random_ids((prompt,), seed=6)
    cache = TidarCache()
    layout = layouts.decode_layout(0, prompt, (prompt,), BLOCK)
    worst = _step_differs(pair, cache, layout, text[:0], text, (prompt,))
    cache.commit(prompt)
    for step, count in enumerate(accepted):
        causal = random_ids((BLOCK,), seed=7 + step)
        layout = layouts.decode_layout(cache.get_seq_length(), BLOCK, proposals, BLOCK)
        worst = max(worst, _step_differs(pair, cache, layout, text, causal, proposals))
        cache.commit(count)
        text = torch.cat([text, causal[:count]])
    return worst


def _step_differs(
    pair: Pair, cache: TidarCache, layout: layouts.Layout, text: Tensor, causal: Tensor, proposals: tuple[int, ...]
) -> float:
    ids = torch.cat([causal, torch.full((BLOCK * len(proposals),), MASK)])
    logits = pair.layout.logits(pair.layout.hidden_states(ids[None], layout, cache))[0]
    drafts, *blocks = logits.split([len(causal), *[BLOCK] * len(proposals)])
    worst = _difference(drafts, causal_logits(pair.plain, torch.cat([text, causal]))[len(text) :])
    for count, block in zip(proposals, blocks, strict=True):
        expected = block_logits(pair.plain, torch.cat([text, causal[:count]]), BLOCK)
        worst = max(worst, _difference(block, expected))
    return worst


def _difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
