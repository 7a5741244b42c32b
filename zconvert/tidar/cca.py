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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.zaya.modeling_zaya import ZayaCCAProjection, repeat_kv

from .cache import TidarCache
from .layout import Layout


@dataclass
class Predecessors:
    """What a CCA layer reads in place of the padding mask that transformers hands it.

    `index` is (R, H + N) int64 over `[H tokens of the past | N new tokens]`: the place there of each token's
    predecessor. The past is what the cache holds; before the first token of a text it is zeros, which precede
    themselves.
    """

    index: Tensor
    cache: TidarCache | None


def predecessors_of(layout: Layout, config: Any, cache: TidarCache | None) -> Predecessors:
    """Builds the index from a layout: (k0 - 1) + (k1 - 1) tokens of the past, then the layout's own."""
    past = (config.cca_time0 - 1) + (config.cca_time1 - 1)
    older = torch.arange(-1, past - 1, device=layout.predecessors.device).clamp_min_(0)
    new = layout.predecessors + past  # NO_PREDECESSOR becomes the latest token of the past
    return Predecessors(torch.cat([older.expand(new.shape[0], past), new], dim=1), cache)


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
        raw_all, delayed_all = self._with_past(raw, delayed, conv_mask.cache)
        gather = _Gather(conv_mask.index)

        mixed = self._convolve(raw_all, gather, length)  # (R, N, channels)
        value_delayed = gather.before(delayed_all)[:, -length:]

        head_shape = (rows, length, -1, self.head_dim)
        keys_repeated = repeat_kv(keys.view(head_shape).transpose(1, 2), self.num_key_value_groups).transpose(1, 2)
        query_residual = (queries.view(head_shape) + keys_repeated) * 0.5
        key_residual = query_residual.view(rows, length, -1, self.num_key_value_groups, self.head_dim).mean(dim=-2)
        width = queries.shape[-1]
        query = mixed[..., :width].view(head_shape) + query_residual
        key = mixed[..., width:].view(head_shape) + key_residual
        value = torch.cat([self.v_proj_current(hidden_states), value_delayed], dim=-1).view(head_shape)
        return query, key, value

    def _with_past(self, raw: Tensor, delayed: Tensor, cache: TidarCache | None) -> tuple[Tensor, Tensor]:
        """Prepends the states of the past to (R, N, …) states, and leaves them all with the cache for `commit`."""
        past = cache.token_states(self.layer_idx) if cache is not None else None
        if past is None:
            rows = raw.shape[0]
            nothing = raw.new_zeros(1, 1, self.hidden_size)
            past = (
                raw.new_zeros(rows, self.conv_kernel_size, raw.shape[-1]),
                self.v_proj_delayed(nothing).expand(rows, self.conv_kernel_size, -1),
            )
        raw_all, delayed_all = torch.cat([past[0], raw], dim=1), torch.cat([past[1], delayed], dim=1)
        if cache is not None:
            cache.stash_token_states(self.layer_idx, (raw_all, delayed_all), self.conv_kernel_size)
        return raw_all, delayed_all

    def _convolve(self, raw_all: Tensor, gather: _Gather, length: int) -> Tensor:
        depthwise, grouped = self.conv_qk_depthwise, self.conv_qk_grouped
        assert depthwise.bias is not None
        assert grouped.bias is not None
        tap, dw = raw_all, raw_all * depthwise.weight[:, 0, -1] + depthwise.bias
        for width in range(2, self.depthwise_kernel_size + 1):
            tap = gather.before(tap)
            dw = dw + tap * depthwise.weight[:, 0, -width]
        # Taps side by side make the grouped convolution one batched product over the groups.
        groups, rows = grouped.groups, raw_all.shape[0]
        taps = []
        for width in range(1, self.grouped_kernel_size + 1):
            dw = dw if width == 1 else gather.before(dw)
            taps.append(dw[:, -length:].reshape(rows * length, groups, -1))
        weight = grouped.weight.flip(-1).view(groups, -1, *grouped.weight.shape[1:])  # (G, out, in, k1)
        weight = weight.permute(0, 3, 2, 1).flatten(1, 2)  # (G, k1 · in, out)
        mixed = torch.bmm(torch.cat(taps, dim=-1).transpose(0, 1), weight)  # (G, R·N, out)
        return mixed.transpose(0, 1).reshape(rows, length, -1) + grouped.bias


class _Gather:
    """Reads each token's predecessor from an (R, M, C) tensor."""

    def __init__(self, index: Tensor) -> None:
        rows, length = index.shape
        row_start = torch.arange(0, rows * length, length, device=index.device)
        self.flat = (index + row_start[:, None]).flatten()

    def before(self, states: Tensor) -> Tensor:
        return states.flatten(0, 1).index_select(0, self.flat).view_as(states)


def graft_cca(model: torch.nn.Module) -> None:
    """Makes every CCA projection of a ZAYA model predecessor-aware, in place; weights and names stay as they are."""
    for module in model.modules():
        if type(module) is ZayaCCAProjection:
            module.__class__ = PredecessorAwareCCA
