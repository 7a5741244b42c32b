"""The key-value cache of a decoding: committed slots, then scratch slots that the next forward overwrites.

A forward writes the states of all its tokens behind the committed ones, causal tokens first. Accepting n of them is
then only counting: they already stand where they belong, and what follows is overwritten. Nothing is cropped or copied.

    slots: [ committed … | accepted drafts | rejected drafts, mask slots ]
                          ^ commit(n) moves the border by n
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache

GROWTH = 256  # slots are reserved in multiples of this


class TidarCache(Cache):
    """Full-length cache for every layer: sliding windows live in the mask.

    Token states (`stash_token_states`) are what convolutional layers keep of the latest tokens.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.committed = 0
        """tokens that stay"""
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (R, heads, capacity, head_dim)
        self._states: dict[int, tuple[Tensor, ...]] = {}
        self._stash: dict[int, tuple[tuple[Tensor, ...], int]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Writes the (R, heads, N, head_dim) states of a forward's tokens; returns those of all tokens it may see."""
        end = self.committed + key_states.shape[2]
        keys, values = self._reserve(layer_idx, end, key_states, value_states)
        keys[:, :, self.committed : end] = key_states
        values[:, :, self.committed : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def _reserve(self, layer_idx: int, end: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        held = self._slots.get(layer_idx)
        if held is not None and held[0].shape[2] >= end:
            return held
        capacity = (end + end // 2 + GROWTH - 1) // GROWTH * GROWTH

        def grown(old: Tensor | None, like: Tensor) -> Tensor:
            new = like.new_empty(*like.shape[:2], capacity, like.shape[3])
            if old is not None:
                new[:, :, : self.committed] = old[:, :, : self.committed]
            return new

        old_keys, old_values = held if held is not None else (None, None)
        self._slots[layer_idx] = grown(old_keys, key_states), grown(old_values, value_states)
        return self._slots[layer_idx]

    def token_states(self, layer_idx: int) -> tuple[Tensor, ...] | None:
        """The latest committed tokens' states of a layer, each (R, H, …); None before the first commit."""
        return self._states.get(layer_idx)

    def stash_token_states(self, layer_idx: int, states: tuple[Tensor, ...], past: int) -> None:
        """Keeps a forward's states, each (R, past + N, …), until `commit` says how many tokens stay."""
        self._stash[layer_idx] = (states, past)

    def commit(self, count: int) -> None:
        """Keeps the first `count` tokens of the latest forward."""
        self.committed += count
        for layer_idx, (states, past) in self._stash.items():
            # The `past` rows that end with the last token kept.
            self._states[layer_idx] = tuple(state[:, count : count + past] for state in states)
        self._stash.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens."""
        return self.committed
