"""Attention sinks in SDPA: one more key, whose value is zero and whose score is the sink's logit.

A sink is a learnt logit a head that takes part in the softmax and then adds nothing. The stock code knows it in eager
attention only; as an additional zero key and value it goes through SDPA, where the mask's column carries the logit.

    keys:  k0 k1 k2 | sink
    q0      0 -∞ -∞ |  s
    q1      0  0 -∞ |  s
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_sinks"


def sdpa_with_sinks(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the attention layer.
        query: (R, heads, N, width).
        key: (R, key heads, K, width).
        value: (R, key heads, K, value width).
        attention_mask: (R, 1, N, K), boolean or additive; None: plain causal.
        dropout: of the attention weights.
        scaling: of the scores; None for 1 / sqrt(width).
        s_aux: (heads,) the sinks' logits; None for a layer without.

    Returns:
        (R, N, heads, value width), and None in place of the weights.
    """
    rows, heads, length = query.shape[:3]
    groups = heads // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    bias = _additive(attention_mask, query, key.shape[2])
    if s_aux is not None:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        sinks = s_aux.to(query.dtype).view(1, heads, 1, 1).expand(rows, heads, length, 1)
        bias = torch.cat([bias.expand(rows, heads, length, -1), sinks], dim=-1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _additive(attention_mask: Tensor | None, query: Tensor, keys: int) -> Tensor:
    """(R or 1, 1, N, K) in the query's dtype."""
    if attention_mask is None:
        length = query.shape[2]
        attention_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)[None, None]
    if attention_mask.dtype != torch.bool:
        return attention_mask.to(query.dtype)
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)


def graft_sinks(model: Any) -> None:
    """Has a model with sinks attend by SDPA, unless somebody chose another implementation than the default."""
    AttentionInterface.register(NAME, sdpa_with_sinks)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation == "eager":
        model.config._attn_implementation = NAME
