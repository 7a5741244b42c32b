"""Layout -> the attention mask that a model of a family takes. Pure tensors.

Masks are additive floats, since these are right in every attention implementation of transformers; boolean masks are
right in SDPA and silently wrong in eager attention, where True is added as 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import Family
from .layout import Layout

SLIDING = ("sliding_attention", "hybrid_sliding")
CHUNKED = ("chunked_attention",)


@dataclass(frozen=True)
class Reach:
    """How far back the layers of one kind see, in positions; None: to the start of the document."""

    window: int | None = None
    """of a sliding layer: keys at `position > query position - window` only"""
    chunk: int | None = None
    """of a chunked layer: keys in the query's own chunk of so many positions only"""


EVERYTHING = Reach()


def visible(query: Layout, key: Layout, reach: Reach = EVERYTHING) -> Tensor:
    """Which keys each query sees.

    Args:
        query: layout of (R, Q).
        key: layout of (R, K).
        reach: of the layer.

    Returns:
        (R, Q, K) bool.

    >>> from .layout import packed_layout
    >>> row = packed_layout(torch.zeros(1, 2, dtype=torch.long), block_size=2)
    >>> visible(row, row)[0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    key_is_clean = ~key.is_masked[:, None, :]
    query_position, key_position = query.position_ids[:, :, None], key.position_ids[:, None, :]
    sees_clean = key_is_clean & (key_position < query.clean_limit[:, :, None])
    same_block = query.is_masked[:, :, None] & (query.block_ids[:, :, None] == key.block_ids[:, None, :])
    seen = (sees_clean | same_block) & (query.document_ids[:, :, None] == key.document_ids[:, None, :])
    if reach.window is not None:
        seen &= key_position > query_position - reach.window
    if reach.chunk is not None:
        seen &= key_position // reach.chunk == query_position // reach.chunk
    return seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, Q, K) bool -> (R, 1, Q, K) float: 0 where seen, the dtype's lowest number elsewhere."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def reach_of(config: Any, kind: str) -> Reach:
    """How far layers of a kind see, by the model's transformers config."""
    if kind in SLIDING:
        window = getattr(config, "sliding_window", None)
        return Reach(window=window if window is not None else getattr(config, "sliding_window_size", None))
    if kind in CHUNKED:
        return Reach(chunk=config.attention_chunk_size)
    return EVERYTHING


def attention_masks(
    family: Family, config: Any, layout: Layout, key: Layout, dtype: torch.dtype, *, uneven: bool = False
) -> Tensor | dict[str, Any] | None:
    """The `attention_mask` argument of a forward: one mask, or one for each kind of layer.

    Args:
        family: the model's row of the family table.
        config: the model's transformers config.
        layout: the forward's tokens, (R, N).
        key: the cache's tokens and these, (R, K).
        dtype: of the attention scores.
        uneven: the cache holds more tokens of some rows than of others, so that there are keys which nobody sees.

    Returns:
        (R, 1, N, K) additive, or a dict of these by kind of layer, as the family takes it. None in place of a mask that
        would hide nothing from a single token.
    """

    def make(reach: Reach) -> Tensor | None:
        alone = layout.num_tokens == 1 and reach == EVERYTHING and not family.indexed and not uneven
        return None if alone else additive(visible(layout, key, reach), dtype)

    return route(family, config, key.num_tokens, make)


def route(family: Family, config: Any, num_keys: int, make: Callable[[Reach], Any]) -> Any:
    """Masks by the way in which a family takes them.

    Args:
        family: the model's row of the family table.
        config: the model's transformers config.
        num_keys: K.
        make: makes the mask of one reach; called once for each.

    Returns:
        What `make` gave, or a dict of it by kind of layer.
    """
    by_reach: dict[Reach, Any] = {}

    def mask_for(reach: Reach) -> Any:
        if any(size is not None and size >= num_keys for size in (reach.window, reach.chunk)):
            reach = EVERYTHING  # nothing is that far away
        if reach not in by_reach:
            by_reach[reach] = make(reach)
        return by_reach[reach]

    if family.masks == "layer_type":
        kinds = family.mask_keys or sorted(set(config.layer_types))
        return {kind: mask_for(reach_of(config, kind)) for kind in kinds}
    return mask_for(reach_of(config, "sliding_attention") if family.masks == "window" else EVERYTHING)
