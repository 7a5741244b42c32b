"""The short convolutions of LFM2 and Inkling, reading predecessors instead of the previous columns of the row.

Both are depthwise and causal. With kernel width k and pi the predecessor:

    out_i = bias + sum_{t<k} W[k-1-t] * x[pi^t(i)]

The classes here stand before the stock class (`grafts.py` joins the two): given `Predecessors` where the stock module
gets the padding mask, they follow them; otherwise the stock module runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .predecessors import Predecessors


def depthwise(states: Tensor, convolution: nn.Conv1d, predecessors: Predecessors) -> Tensor:
    """(R, past + N, C) -> (R, past + N, C): the convolution with its taps along the predecessors."""
    weight = convolution.weight[:, 0]  # (C, k)
    tap, out = states, states * weight[:, -1]
    if convolution.bias is not None:
        out = out + convolution.bias
    for width in range(2, weight.shape[1] + 1):
        tap = predecessors.before(tap)
        out = out + tap * weight[:, -width]
    return out


class Lfm2Conv:
    """Before `Lfm2ShortConv` or `Lfm2MoeShortConv`: a gated convolution that is the whole of its layer."""

    in_proj: Any
    out_proj: Any
    conv: Any
    layer_idx: int

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """(R, N, hidden) -> (R, N, hidden)."""
        if not isinstance(attention_mask, Predecessors):
            stock: Any = super()
            return stock.forward(hidden_states, past_key_values, attention_mask, **kwargs)
        gate_in, gate_out, states = self.in_proj(hidden_states).chunk(3, dim=-1)
        states = gate_in * states
        joined = attention_mask.with_past(self.layer_idx, "conv", states)
        mixed = depthwise(joined, self.conv, attention_mask)[:, -states.shape[1] :]
        return self.out_proj(gate_out * mixed)


class InklingConv:
    """Before `InklingShortConvolution`: a convolution beside its own residual, in float32."""

    conv1d: Any
    layer_idx: int
    conv_idx: int

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, conv_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """(R, N, C) -> (R, N, C)."""
        if not isinstance(conv_mask, Predecessors):
            stock: Any = super()
            return stock.forward(hidden_states, past_key_values, conv_mask, **kwargs)
        states = hidden_states.float()
        joined = conv_mask.with_past(self.layer_idx, f"conv {self.conv_idx}", states)
        mixed = depthwise(joined, self.conv1d, conv_mask)[:, -states.shape[1] :]
        return (mixed + states).to(hidden_states.dtype)
