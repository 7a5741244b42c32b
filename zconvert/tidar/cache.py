"""The key-value cache of a decoding: each row's committed slots, then scratch slots that its next forward overwrites.

A forward writes the states of all its tokens behind the committed ones, causal tokens first. Accepting n of them is
then only counting: they already stand where they belong, and what follows is overwritten. Nothing is cropped or copied.
Rows commit different numbers of tokens, so each has a border of its own:

    row 0: [ committed …          | accepted drafts | rejected drafts, mask slots ]
    row 1: [ committed … | accepted drafts | rejected drafts, mask slots ] stale
                         ^ commit moves each row's border by its own count
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

GROWTH = 256  # slots are reserved, and shown to forwards of fixed shapes, in multiples of this


class TidarCache(Cache):
    """Full-length cache for every layer: sliding windows live in the mask.

    Token states (`stash_token_states`) are what convolutional layers keep of the latest tokens.
    """

    def __init__(self, rows: int = 1) -> None:
        """Makes an empty cache of so many rows; memory is reserved by the first forward."""
        super().__init__(layers=[])
        self._lengths = [0] * rows
        self._first, self._end = 0, rows  # rows of the forward under way
        self._slots: dict[tuple[int, str], Tensor] = {}  # (layer, what) -> states (rows, …, capacity, width)
        self._states: dict[tuple[int, str], Tensor] = {}  # (layer, what) -> (rows, past, width)
        self._boundary: dict[tuple[int, str], Tensor] = {}  # the same before a text's first token, (past, width)
        self._stash: dict[tuple[int, str], tuple[Tensor, int]] = {}
        self._places: tuple[Tensor, Tensor] | None = None
        self.fixed: int | None = None
        """slots that the coming forward sees of each row, whatever the rows hold, see `fix`"""

    def open(self, first: int, end: int) -> None:
        """Says which rows the coming forwards run over: `first` to `end`, exclusive."""
        assert 0 <= first < end <= len(self._lengths), (first, end, len(self._lengths))
        self._first, self._end, self._places, self.fixed = first, end, None, None

    def fix(self, count: int, device: torch.device) -> None:
        """Makes the shapes of the coming forward, of `count` tokens, those of the forwards around it: compiled code.

        It sees whole steps of GROWTH slots, and never all there are: a part is laid out otherwise than the whole. What
        depends on the rows' own lengths is done here, ahead of it.
        """
        self.fixed = -(-(self.get_seq_length() + count) // GROWTH) * GROWTH
        for place, held in self._slots.items():
            if held.shape[-2] <= self.fixed:
                self._slots[place] = held = self._grown(held, held, self.fixed + 1)
            if held.is_cuda:  # a CUDA graph writes where they lie, instead of taking a copy along
                torch._dynamo.mark_static_address(held)
        self._scratch(count, device)

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each open row."""
        return self._lengths[self._first : self._end]

    @property
    def num_slots(self) -> int:
        """Slots that memory is reserved for in each row."""
        return max((held.shape[-2] for held in self._slots.values()), default=0)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Writes the (R, heads, N, head_dim) states of a forward's tokens; returns those of all tokens it may see.

        Keys and values may differ in heads and width; MLA layers keep their latent states here.
        """
        return self._write((layer_idx, "keys"), key_states), self._write((layer_idx, "values"), value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """The same for the (R, N, width) keys by which a sparse indexer chooses what its layer attends to."""
        return self._write((layer_idx, "indexer"), indexer_key_states)

    def _write(self, place: tuple[int, str], states: Tensor) -> Tensor:
        """Puts (R, …, N, width) states behind the open rows' borders; returns (R, …, longest + N, width), a view."""
        if self.fixed is not None:
            rows = self._slots[place][self._first : self._end]
            rows.movedim(-2, 1)[self._scratch(states.shape[-2], states.device)] = states.movedim(-2, 1)
            return rows[..., : self.fixed, :]
        lengths, count = self.lengths, states.shape[-2]
        end = max(lengths) + count
        held = self._slots.get(place)
        if held is None or held.shape[-2] < end:
            held = self._slots[place] = self._grown(held, states, end)
        rows = held[self._first : self._end]
        if lengths.count(lengths[0]) == len(lengths):
            rows[..., lengths[0] : end, :] = states
        else:
            rows.movedim(-2, 1)[self._scratch(count, states.device)] = states.movedim(-2, 1)
        return rows[..., :end, :]

    def _scratch(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(R, 1) rows and (R, count) slots behind their borders; the same for all layers of a forward."""
        if self._places is None or self._places[1].shape[1] != count or self._places[1].device != device:
            border = torch.tensor(self.lengths, device=device)[:, None]
            row = torch.arange(len(border), device=device)[:, None]
            self._places = row, border + torch.arange(count, device=device)
        return self._places

    def _grown(self, held: Tensor | None, states: Tensor, end: int) -> Tensor:
        """Room for `end` slots and half as many again; zeros, since what is hidden must still be a number."""
        capacity = (end + end // 2 + GROWTH - 1) // GROWTH * GROWTH
        grown = states.new_zeros(len(self._lengths), *states.shape[1:-2], capacity, states.shape[-1])
        if held is not None:
            grown[..., : held.shape[-2], :] = held
        return grown

    def token_states(self, layer_idx: int, name: str) -> Tensor | None:
        """(R, past, C): the latest committed tokens' states of a layer; None before the first commit."""
        held = self._states.get((layer_idx, name))
        return None if held is None else held[self._first : self._end]

    def stash_token_states(self, layer_idx: int, name: str, states: Tensor, past: int) -> None:
        """Keeps a forward's (R, past + N, C) states until `commit` says how many tokens stay."""
        place = layer_idx, name
        self._stash[place] = states, past
        if place not in self._boundary:  # the first forward of all: before its tokens stands the start of a text
            self._boundary[place] = states[0, :past].clone()

    def commit(self, counts: int | Sequence[int]) -> None:
        """Keeps the first tokens of the latest forward: a number for each open row, or one for all."""
        open_rows = self._end - self._first
        counts = [counts] * open_rows if isinstance(counts, int) else list(counts)
        assert len(counts) == open_rows, (counts, open_rows)
        for row, count in enumerate(counts, self._first):
            self._lengths[row] += count
        self._places = None
        index: Tensor | None = None
        for place, (states, past) in self._stash.items():
            if place not in self._states:
                self._states[place] = self._boundary[place].repeat(len(self._lengths), 1, 1)
            # Of each row the `past` states that end with the last token kept.
            if counts.count(counts[0]) == open_rows:
                kept = states[:, counts[0] : counts[0] + past]
            else:
                if index is None or index.shape[1] != past:
                    index = torch.tensor(counts, device=states.device)[:, None]
                    index = index + torch.arange(past, device=states.device)
                kept = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
            self._states[place][self._first : self._end] = kept
        self._stash.clear()

    def clear(self, row: int) -> None:
        """Empties a row for another text; its memory stays."""
        self._lengths[row] = 0
        for place, states in self._states.items():
            states[row] = self._boundary[place]

    def exchange(self, row: int, other: int) -> None:
        """Two rows change places."""
        lengths = self._lengths
        lengths[row], lengths[other] = lengths[other], lengths[row]
        here, there, filled = [row, other], [other, row], max(lengths[row], lengths[other])
        for slots in self._slots.values():
            slots[here, ..., :filled, :] = slots[there, ..., :filled, :]
        for states in self._states.values():
            states[here] = states[there]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens of the longest open row."""
        return max(self.lengths)


class CleanStates(TidarCache):
    """What the clean half of packed rows leaves for their mask half, where nothing of it is trained: constants.

    The clean half runs first and writes; after `complete` the mask half reads, once or, with activation checkpointing,
    several times.
    """

    complete = False
    """the clean half is done"""

    def _write(self, place: tuple[int, str], states: Tensor) -> Tensor:
        if not self.complete:
            self._slots[place] = states
            return states
        return torch.cat([self._slots[place], states], dim=-2)

    def token_states(self, layer_idx: int, name: str) -> Tensor | None:
        """(R, past + T, C): a layer's states of the boundary and of the clean half; None while that runs."""
        return self._stash[layer_idx, name][0] if self.complete else None

    def stash_token_states(self, layer_idx: int, name: str, states: Tensor, past: int) -> None:
        """Keeps the clean half's states."""
        if not self.complete:
            self._stash[layer_idx, name] = states, past
