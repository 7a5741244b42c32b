"""Attention sinks in SDPA: one more key, whose value is zero and whose score is the sink's logit.

A sink is a learnt logit a head that takes part in the softmax and then adds nothing. The stock code knows it in eager
attention only; as an additional zero key and value it goes through SDPA, where the mask's column carries the logit.
Forwards over layouts ask for this; in any other the model attends as it always did, bit for bit.

    keys:  k0 k1 k2 | sink
    q0      0 -∞ -∞ |  s
    q1      0  0 -∞ |  s
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import eager_mask

NAME = "sdpa_sinks"
ARGUMENT = "in_layout"


def sdpa_with_sinks(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers.

    Args:
        module: the attention layer.
        query: (R, heads, N, width).
        key: (R, key heads, K, width).
        value: (R, key heads, K, value width).
        attention_mask: (R, 1, N, K), additive; None hides nothing.
        dropout: of the attention weights.
        scaling: of the scores; None for 1 / sqrt(width).
        s_aux: (heads,) the sinks' logits; None for a layer without.
        **options: `in_layout`, true in a forward over a layout; what else the layer hands its stock attention.

    Returns:
        (R, N, heads, value width), and None in place of the weights.
    """
    if not options.pop(ARGUMENT, False):
        options |= {"scaling": scaling, "dropout": dropout, "s_aux": s_aux}
        return stock_attention(module)(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    bias = query.new_zeros(1, 1, 1, key.shape[2]) if attention_mask is None else attention_mask
    output = attend(query, repeat_kv(key, groups), repeat_kv(value, groups), bias, s_aux, dropout, scaling)
    return output.transpose(1, 2).contiguous(), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """SDPA, with one more key where there are sinks.

    Args:
        query: (R, heads, N, width).
        key: (R, heads, K, width).
        value: (R, heads, K, value width).
        bias: added to the scores; broadcasts to (R, heads, N, K).
        sinks: (heads,) their logits.
        dropout: of the attention weights.
        scaling: of the scores; None for 1 / sqrt(width).

    Returns:
        (R, heads, N, value width).
    """
    if sinks is not None:
        rows, heads, length = query.shape[:3]
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        column = sinks.to(query.dtype).view(1, heads, 1, 1).expand(rows, heads, length, 1)
        bias = torch.cat([bias.expand(rows, heads, length, -1), column], dim=-1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)


def stock_attention(module: Any) -> Any:
    """The eager attention of the layer's own modelling code."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise AssertionError(f"{type(module).__name__} has no eager attention")


def graft_sinks(model: Any) -> None:
    """Has a model with sinks attend by SDPA, unless somebody chose another implementation than the default."""
    AttentionInterface.register(NAME, sdpa_with_sinks)
    AttentionMaskInterface.register(NAME, eager_mask)
    config = model.config.get_text_config()
    if config._attn_implementation == "eager":
        config._attn_implementation = NAME
