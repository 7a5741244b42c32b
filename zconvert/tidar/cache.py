"""The key-value cache of a decoding: committed slots, then scratch slots that the next forward overwrites.

A forward writes the states of all its tokens behind the committed ones, causal tokens first. Accepting n of them is
then only counting: they already stand where they belong, and what follows is overwritten. Nothing is cropped or copied.

    slots: [ committed … | accepted drafts | rejected drafts, mask slots ]
                          ^ commit(n) moves the border by n
"""

from __future__ import annotations

import torch
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
        self._slots: dict[tuple[int, str], Tensor] = {}  # (layer, what) -> states (R, …, capacity, width)
        self._states: dict[tuple[int, str], Tensor] = {}  # (layer, what) -> (R, past, width)
        self._stash: dict[tuple[int, str], tuple[Tensor, int]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Writes the (R, heads, N, head_dim) states of a forward's tokens; returns those of all tokens it may see.

        Keys and values may differ in heads and width; MLA layers keep their latent states here.
        """
        return self._write((layer_idx, "keys"), key_states), self._write((layer_idx, "values"), value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """The same for the (R, N, width) keys by which a sparse indexer chooses what its layer attends to."""
        return self._write((layer_idx, "indexer"), indexer_key_states)

    def _write(self, place: tuple[int, str], states: Tensor) -> Tensor:
        """Puts (…, N, width) states behind the committed ones; returns (…, committed + N, width), a view."""
        end = self.committed + states.shape[-2]
        held = self._slots.get(place)
        if held is None or held.shape[-2] < end:
            capacity = (end + end // 2 + GROWTH - 1) // GROWTH * GROWTH
            grown = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
            if held is not None:
                grown[..., : self.committed, :] = held[..., : self.committed, :]
            self._slots[place] = held = grown
        held[..., self.committed : end, :] = states
        return held[..., :end, :]

    def token_states(self, layer_idx: int, name: str) -> Tensor | None:
        """(R, past, C): the latest committed tokens' states of a layer; None before the first commit."""
        return self._states.get((layer_idx, name))

    def stash_token_states(self, layer_idx: int, name: str, states: Tensor, past: int) -> None:
        """Keeps a forward's (R, past + N, C) states until `commit` says how many tokens stay."""
        self._stash[layer_idx, name] = states, past

    def commit(self, count: int) -> None:
        """Keeps the first `count` tokens of the latest forward."""
        self.committed += count
        for place, (states, past) in self._stash.items():
            self._states[place] = states[:, count : count + past]  # the `past` rows that end with the last token kept
        self._stash.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens."""
        return self.committed


class CleanStates(TidarCache):
    """What the clean half of packed rows leaves for their mask half, where nothing of it is trained: constants.

    The clean half runs first and writes; after `complete` the mask half reads, once or, with activation checkpointing,
    several times.
    """

    def complete(self) -> None:
        """The clean half is done."""
        self.committed = next(iter(self._slots.values())).shape[-2]

    def _write(self, place: tuple[int, str], states: Tensor) -> Tensor:
        if not self.committed:
            self._slots[place] = states
            return states
        return torch.cat([self._slots[place], states], dim=-2)

    def token_states(self, layer_idx: int, name: str) -> Tensor | None:
        """(R, past + T, C): a layer's states of the boundary and of the clean half; None while that runs."""
        return self._stash[layer_idx, name][0] if self.committed else None

    def stash_token_states(self, layer_idx: int, name: str, states: Tensor, past: int) -> None:
        """Keeps the clean half's states."""
        if not self.committed:
            super().stash_token_states(layer_idx, name, states, past)
