"""What the untouched model of transformers says: nothing of zconvert takes part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.contracts.models import MASK


def causal_logits(plain: Any, ids: Tensor) -> Tensor:
    """Logits of a text alone: (T,) -> (T, V)."""
    return plain(input_ids=ids[None], use_cache=False).logits[0]


def block_logits(plain: Any, prefix: Tensor, block: Tensor | int) -> Tensor:
    """Logits of one block of mask slots that follows a prefix, with nothing else in the row.

    In this row the previous column is every token's predecessor, so that ZAYA's stock convolution is right, and the
    attention mask is a few lines of Python:

        keys: p0 p1 | m0 m1
        p0     1  . |  .  .
        p1     1  1 |  .  .
        m0     1  1 |  1  1
        m1     1  1 |  1  1

    Args:
        plain: a model of transformers.
        prefix: (P,) clean tokens.
        block: number of mask slots, or their ids.

    Returns:
        (b, V) logits of the mask slots.
    """
    slots = torch.full((block,), MASK) if isinstance(block, int) else block
    ids = torch.cat([prefix, slots])
    masks = _masks_by_layer_type(plain.config, len(prefix), len(slots))
    return plain(input_ids=ids[None], attention_mask=masks, use_cache=False).logits[0, len(prefix) :]


def _masks_by_layer_type(config: Any, prefix: int, block: int) -> Any:
    def mask(window: int | None) -> Tensor:
        bias = torch.full((prefix + block, prefix + block), torch.finfo(torch.float32).min)
        for query in range(prefix + block):
            for key in range(prefix + block):
                if (key <= query or query >= prefix) and (window is None or key > query - window):
                    bias[query, key] = 0
        return bias[None, None]

    if getattr(config, "layer_types", None) is None:
        return mask(getattr(config, "sliding_window", None))
    return {"hybrid": mask(None), "hybrid_sliding": mask(config.sliding_window), "conv": None}
