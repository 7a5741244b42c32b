"""What the untouched model of transformers says: nothing of zconvert takes part."""

from __future__ import annotations

import inspect
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
    masks = _masks(plain, len(prefix), len(slots))
    if plain.config.get_text_config() is plain.config:
        return plain(input_ids=ids[None], attention_mask=masks, use_cache=False).logits[0, len(prefix) :]
    # A composite model makes masks of its own, so its text model is asked apart.
    text = plain.get_decoder()
    hidden = getattr(text, "model", text)(input_ids=ids[None], attention_mask=masks, use_cache=False).last_hidden_state
    logits = (text if hasattr(text, "lm_head") else plain).lm_head(hidden)
    cap = getattr(plain.config.get_text_config(), "final_logit_softcapping", None)
    return (logits if cap is None else torch.tanh(logits / cap) * cap)[0, len(prefix) :]


def _masks(plain: Any, prefix: int, block: int) -> Any:
    """What the model's own code would take: read in its source, so that the family table has no say in it."""

    def mask(window: int | None = None, chunk: int | None = None) -> Tensor:
        bias = torch.full((prefix + block, prefix + block), torch.finfo(torch.float32).min)
        for query in range(prefix + block):
            for key in range(prefix + block):
                near = window is None or key > query - window
                same_chunk = chunk is None or key // chunk == query // chunk
                if (key <= query or query >= prefix) and near and same_chunk:
                    bias[query, key] = 0
        return bias[None, None]

    config, source = plain.config.get_text_config(), inspect.getsource(inspect.getmodule(type(plain.get_decoder())))
    window = getattr(config, "sliding_window", None) or getattr(config, "sliding_window_size", None)
    if "attention_mask, dict)" not in source:
        return mask(window if "create_sliding_window_causal_mask" in source else None)
    full, chunk = mask(), getattr(config, "attention_chunk_size", None)
    return {
        **dict.fromkeys(
            ("full_attention", "attention", "indexed_attention", "deepseek_sparse_attention", "hybrid"), full
        ),
        **dict.fromkeys(("sliding_attention", "hybrid_sliding"), mask(window)),
        "chunked_attention": mask(chunk=chunk),
        **dict.fromkeys(("conv", "linear_attention")),
    }
