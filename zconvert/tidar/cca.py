"""ZAYA's Compressed Convolutional Attention, reading each token's predecessor instead of the previous column.

The stock projection convolves over the columns of the row, whatever the attention mask says: in a packed row a mask
slot would read its neighbours in the row, labels among them. Here every tap follows the layout's predecessor index.
With kernel widths k0 and k1, r the raw query and key projections, and pi the predecessor:

    dw_i  = b0 + sum_{s<k0} W0[k0-1-s] * r[pi^s(i)]          depthwise
    mix_i = b1 + sum_{t<k1} W1[k1-1-t] @ dw[pi^t(i)]         grouped by head

Before a document's first token stand zeros in r, so that dw there is b0, and the delayed value there is
v_proj_delayed(0). Source: CCA (arXiv 2510.04476) and transformers' ZayaCCAProjection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.zaya.modeling_zaya import ZayaCCAProjection, repeat_kv

from .predecessors import Predecessors
from .short_conv import depthwise
from .swap import become


class PredecessorAwareCCA(ZayaCCAProjection):
    """The stock module with the same weights; given `Predecessors`, it follows them. Otherwise it is the stock one."""

    def forward(self, hidden_states: Tensor, past_key_values: Any, conv_mask: Any = None) -> Any:
        """Projects (R, N, hidden) to queries (R, N, heads, head_dim), keys and values (R, N, kv heads, head_dim)."""
        if not isinstance(conv_mask, Predecessors):
            return super().forward(hidden_states, past_key_values, conv_mask)
        rows, length = hidden_states.shape[:2]
        queries, keys = self.q_proj(hidden_states), self.k_proj(hidden_states)
        raw = torch.cat([queries, keys], dim=-1)  # (R, N, channels)
        delayed = self.v_proj_delayed(hidden_states)  # (R, N, kv / 2)
        # Before a text: nothing in the raw projections, and the delayed value of nothing.
        nothing = raw.new_zeros(1, 1, self.hidden_size)
        raw_all = conv_mask.with_past(self.layer_idx, "raw", raw)
        delayed_all = conv_mask.with_past(self.layer_idx, "delayed", delayed, lambda: self.v_proj_delayed(nothing))

        mixed = self._convolve(raw_all, conv_mask, length)  # (R, N, channels)
        value_delayed = conv_mask.before(delayed_all)[:, -length:]

        head_shape = (rows, length, -1, self.head_dim)
        keys_repeated = repeat_kv(keys.view(head_shape).transpose(1, 2), self.num_key_value_groups).transpose(1, 2)
        query_residual = (queries.view(head_shape) + keys_repeated) * 0.5
        key_residual = query_residual.view(rows, length, -1, self.num_key_value_groups, self.head_dim).mean(dim=-2)
        width = queries.shape[-1]
        query = mixed[..., :width].view(head_shape) + query_residual
        key = mixed[..., width:].view(head_shape) + key_residual
        value = torch.cat([self.v_proj_current(hidden_states), value_delayed], dim=-1).view(head_shape)
        return query, key, value

    def _convolve(self, raw_all: Tensor, predecessors: Predecessors, length: int) -> Tensor:
        grouped, dw = self.conv_qk_grouped, depthwise(raw_all, self.conv_qk_depthwise, predecessors)
        assert grouped.bias is not None
        # Taps side by side make the grouped convolution one batched product over the groups.
        groups, rows = grouped.groups, raw_all.shape[0]
        taps = []
        for width in range(1, self.grouped_kernel_size + 1):
            dw = dw if width == 1 else predecessors.before(dw)
            taps.append(dw[:, -length:].reshape(rows * length, groups, -1))
        weight = grouped.weight.flip(-1).view(groups, -1, *grouped.weight.shape[1:])  # (G, out, in, k1)
        weight = weight.permute(0, 3, 2, 1).flatten(1, 2)  # (G, k1 · in, out)
        mixed = torch.bmm(torch.cat(taps, dim=-1).transpose(0, 1), weight)  # (G, R·N, out)
        return mixed.transpose(0, 1).reshape(rows, length, -1) + grouped.bias


def graft_cca(model: torch.nn.Module) -> None:
    """Makes every CCA projection of a ZAYA model predecessor-aware, in place; weights and names stay as they are.

    Raises:
        ValueError: the weights of its convolutions, which are read past their modules, are offloaded.
    """
    for module in model.modules():
        if type(module) is ZayaCCAProjection:
            if any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError("ZAYA's layers cannot be offloaded to memory or disk: choose a device_map of devices")
            become(module, PredecessorAwareCCA)
