"""What convolutions read: each token's predecessor in the text, whatever stands before it in the row.

A stock convolution runs over the columns of the row and never asks the attention mask: in a packed row a mask slot
would read its neighbours there, labels among them. Here every tap follows the layout's predecessor index instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cache import TidarCache
from .layout import Layout


@dataclass
class Predecessors:
    """What a convolutional layer gets in place of the padding mask that transformers hands it.

    `index` is (R, past + N) int64 over `[past tokens | N new tokens]`: the place there of each token's predecessor. The
    past is what the cache holds of the latest tokens; before the first token of a text it is the layer's boundary
    (zeros), each row of which precedes the next.
    """

    index: Tensor
    past: int
    cache: TidarCache | None

    def __post_init__(self) -> None:
        rows, length = self.index.shape
        row_start = torch.arange(0, rows * length, length, device=self.index.device)
        self._flat = (self.index + row_start[:, None]).flatten()

    def to(self, device: torch.device | int | str, **options: Any) -> Predecessors:
        """The same on another device, as tensors have it: a model may be spread over several."""
        return replace(self, index=self.index.to(device, **options))

    def with_past(
        self, layer_idx: int, name: str, states: Tensor, boundary: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Prepends the past to a layer's states, and leaves both with the cache for `commit`.

        Args:
            layer_idx: of the layer.
            name: tells several states of one layer apart.
            states: (R, N, C), of this forward's tokens.
            boundary: gives the (1, 1, C) that stand before the first token of a text; None: zeros.

        Returns:
            (R, past + N, C).
        """
        held = None if self.cache is None else self.cache.token_states(layer_idx, name)
        if held is None:
            rows, _, width = states.shape
            first = states.new_zeros(1, 1, width) if boundary is None else boundary()
            held = first.expand(rows, self.past, width)
        joined = torch.cat([held, states], dim=1)
        if self.cache is not None:
            self.cache.stash_token_states(layer_idx, name, joined, self.past)
        return joined

    def before(self, states: Tensor) -> Tensor:
        """(R, past + N, C) -> (R, past + N, C): for each token what its predecessor has."""
        return states.flatten(0, 1).index_select(0, self._flat).view_as(states)


def predecessors_of(layout: Layout, past: int, cache: TidarCache | None) -> Predecessors:
    """Builds the index from a layout: `past` tokens of the past, then the layout's own."""
    older = torch.arange(-1, past - 1, device=layout.predecessors.device).clamp_min_(0)
    new = layout.predecessors + past  # NO_PREDECESSOR becomes the latest token of the past
    return Predecessors(torch.cat([older.expand(new.shape[0], past), new], dim=1), past, cache)
