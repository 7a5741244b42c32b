"""Attention that reads positions otherwise than by rotary embeddings: Llama 4's temperature, Inkling's distances.

The stock code counts positions from the cache's length, as if a forward's tokens followed one another. In a packed row
and in a decoding forward they do not, so the layout's positions are handed down to these layers as a keyword argument.
The classes here stand before the stock class (`grafts.py` joins the two); without positions the stock module runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .packed_attention import PackedMask

ARGUMENT = "layout_positions"


@dataclass
class Positions:
    """Places in the document, from 0."""

    query: Tensor
    """(R, N) int64"""
    key: Tensor
    """(R, committed + N) int64"""

    def to(self, device: torch.device | int | str, **options: Any) -> Positions:
        """The same on another device, as tensors have it: a model may be spread over several."""
        return Positions(self.query.to(device, **options), self.key.to(device, **options))


class Llama4Attention:
    """Before `Llama4TextAttention`: layers without rotary embeddings scale queries by the logarithm of the position."""

    head_dim: int
    use_rope: Any
    attn_temperature_tuning: Any
    floor_scale: float
    attn_scale: float
    q_proj: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the stock one; `layout_positions` says where the tokens stand."""
        positions: Positions | None = kwargs.pop(ARGUMENT, None)
        stock: Any = super()
        if positions is None or self.use_rope or not self.attn_temperature_tuning:
            return stock.forward(hidden_states, *args, **kwargs)
        steps = torch.floor((positions.query.float() + 1.0) / self.floor_scale)
        scale = torch.log1p(steps) * self.attn_scale + 1.0  # (R, N)
        # These layers do nothing else to the query, so that scaling it as it is projected comes to the same.
        hook = self.q_proj.register_forward_hook(lambda _module, _inputs, query: (query * scale[..., None]).to(query))
        self.attn_temperature_tuning = False
        try:
            return stock.forward(hidden_states, *args, **kwargs)
        finally:
            self.attn_temperature_tuning = True
            hook.remove()


class InklingAttention:
    """Before `InklingAttention`: a learnt bias by distance, and queries scaled by the logarithm of the position."""

    config: Any
    layer_idx: int
    head_dim: int
    num_heads: int
    is_sliding: bool
    scaling: float
    sliding_window: int | None
    rel_logits_proj: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        conv_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock one; `layout_positions` says where the tokens stand."""
        positions: Positions | None = kwargs.pop(ARGUMENT, None)
        module: Any = self
        if positions is None:
            stock: Any = super()
            return stock.forward(hidden_states, attention_mask, conv_mask, past_key_values, **kwargs)
        shape = hidden_states.shape[:-1]

        def heads(states: Tensor) -> Tensor:
            return states.view(*shape, -1, self.head_dim)

        def convolved(projection: Any, convolution: Any) -> Tensor:
            states = projection(hidden_states)
            return heads(convolution(states, past_key_values=past_key_values, conv_mask=conv_mask))

        query = module.q_norm(heads(module.q_proj(hidden_states))).transpose(1, 2)
        key = module.k_norm(convolved(module.k_proj, module.k_sconv)).transpose(1, 2)
        value = convolved(module.v_proj, module.v_sconv).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        relative = module.r_proj(hidden_states).view(*shape, self.num_heads, -1)
        by_distance = (relative @ self.rel_logits_proj.proj).transpose(1, 2)  # (R, heads, N, extent)
        if not self.is_sliding and self.config.log_scaling_n_floor is not None:
            excess = ((positions.query + 1).float() / self.config.log_scaling_n_floor).clamp(min=1.0)
            tau = (1.0 + self.config.log_scaling_alpha * torch.log(excess))[:, None, :, None]  # (R, 1, N, 1)
            query, by_distance = (
                (query.float() * tau).to(query.dtype),
                (by_distance.float() * tau).to(by_distance.dtype),
            )
        # Segments of a packed row ask for theirs: of the whole row's pairs most are nobody's.
        bias: Any = DistanceBias(by_distance, positions)
        if not isinstance(attention_mask, PackedMask):
            bias = bias.of(slice(None), (slice(None),))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            position_bias=bias,
            **kwargs,
        )
        return module.o_proj(output.reshape(*shape, -1).contiguous()), weights


@dataclass
class DistanceBias:
    """A learnt bias by the distance between query and key: none ahead or beyond its extent."""

    by_distance: Tensor
    """(R, heads, N, extent)"""
    positions: Positions

    def of(self, queries: slice, keys: tuple[slice, ...]) -> Tensor:
        """(R, heads, n, k): of some queries, and of some columns of keys side by side."""
        key = torch.cat([self.positions.key[:, columns] for columns in keys], dim=1)
        distance = (self.positions.query[:, queries, None] - key[:, None, :])[:, None]  # (R, 1, n, k)
        of_queries = self.by_distance[:, :, queries]
        heads, extent = of_queries.shape[1], of_queries.shape[3]
        place = distance.clamp(0, extent - 1).expand(-1, heads, -1, -1)
        return of_queries.gather(-1, place).masked_fill((distance < 0) | (distance >= extent), 0.0)


def _eager(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """Inkling's own eager attention, the one that knows a position bias."""
    from transformers.models.inkling.modeling_inkling import eager_attention_forward

    return eager_attention_forward(module, query, key, value, attention_mask, **options)
