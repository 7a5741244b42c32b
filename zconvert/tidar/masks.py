"""Layout -> the attention mask that a model of a family takes. Pure tensors.

Masks are additive floats, since these are right in every attention implementation of transformers; boolean masks are
right in SDPA and silently wrong in eager attention, where True is added as 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .families import Family
from .layout import Layout, with_committed

SLIDING = ("sliding_attention", "hybrid_sliding")


def visible(query: Layout, key: Layout, window: int | None = None) -> Tensor:
    """Which keys each query sees.

    Args:
        query: layout of (R, Q).
        key: layout of (R, K).
        window: of a sliding layer, in positions: keys at `position > query position - window` only.

    Returns:
        (R, Q, K) bool.

    >>> from .layout import packed_layout
    >>> row = packed_layout(torch.zeros(1, 2, dtype=torch.long), block_size=2)
    >>> visible(row, row)[0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    key_is_clean = ~key.is_masked[:, None, :]
    sees_clean = key_is_clean & (key.position_ids[:, None, :] < query.clean_limit[:, :, None])
    same_block = query.is_masked[:, :, None] & (query.block_ids[:, :, None] == key.block_ids[:, None, :])
    seen = (sees_clean | same_block) & (query.document_ids[:, :, None] == key.document_ids[:, None, :])
    if window is not None:
        seen &= key.position_ids[:, None, :] > query.position_ids[:, :, None] - window
    return seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, Q, K) bool -> (R, 1, Q, K) float: 0 where seen, the dtype's lowest number elsewhere."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def layer_windows(config: Any) -> dict[str, int | None]:
    """Layer type -> sliding window in positions, for the layer types that a config has."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return {kind: config.sliding_window if kind in SLIDING else None for kind in sorted(kinds)}


def attention_masks(family: Family, config: Any, layout: Layout, committed: int, dtype: torch.dtype) -> Any:
    """The `attention_mask` argument of a forward: one mask, or one for each layer type.

    Args:
        family: the model's row of the family table.
        config: the model's transformers config.
        layout: the forward's tokens, (R, N).
        committed: tokens in the cache before them; 0 in training.
        dtype: of the attention scores.

    Returns:
        (R, 1, N, committed + N) additive, or a dict of these by layer type, as the family takes it. None in place of
        a mask that would hide nothing from a single token.
    """
    key = with_committed(layout, committed) if committed else layout
    by_window: dict[int | None, Tensor | None] = {}

    def mask_for(window: int | None) -> Tensor | None:
        if window is not None and window >= committed + layout.num_tokens:
            window = None  # it would hide nothing
        if window not in by_window:
            alone = layout.num_tokens == 1 and window is None
            by_window[window] = None if alone else additive(visible(layout, key, window), dtype)
        return by_window[window]

    if family.mask_route == "layer_type":
        return {kind: mask_for(window) for kind, window in layer_windows(config).items()}
    return mask_for(getattr(config, "sliding_window", None))
