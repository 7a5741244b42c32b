"""Which token follows which: a bias on drafts, so that neighbouring slots agree with each other.

The slots of a block are predicted side by side, each without knowing what the others chose. Text decides otherwise: a
token makes some tokens after it likelier. So drafts are chosen from left to right, and the logits of a slot's likeliest
tokens get `weight · b(previous, token)` added, where

    b(a, t) = log P(t | a) - log P(t),    P(t | a) = (count(a t) + P(t)) / (count(a) + 1)

is counted on the training text. Only q changes, which may be anything: lossless decoding stays lossless.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT = 0.4
CANDIDATES = 4  # of a slot: more of them changed nothing
SUCCESSORS = 32  # kept of each token
_NONE = -1  # fills up the successors of tokens that have fewer


@dataclass(frozen=True)
class Bigrams:
    """b of the most frequent pairs."""

    successors: Tensor
    """(V, S) int32: the tokens that most often follow; -1 fills up"""
    bias: Tensor
    """(V, S) float32: b of these pairs"""
    floor: Tensor
    """(V,) float32: b of all other tokens after this one"""

    def of(self, previous: Tensor, tokens: Tensor) -> Tensor:
        """b of (R,) previous tokens and (R, K) tokens after them: (R, K) float32."""
        pairs = self.successors[previous][:, None, :] == tokens[:, :, None]  # (R, K, S)
        bias = (self.bias[previous][:, None, :] * pairs).sum(-1)
        return torch.where(pairs.any(-1), bias, self.floor[previous][:, None])

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        return {"successors": self.successors, "bias": self.bias, "floor": self.floor}

    def to(self, device: torch.device) -> Bigrams:
        """The same elsewhere."""
        return Bigrams(self.successors.to(device), self.bias.to(device), self.floor.to(device))

    @classmethod
    def count(cls, documents: Iterable[Tensor], vocabulary: int, successors: int = SUCCESSORS) -> Bigrams:
        """Counts pairs.

        Args:
            documents: token ids, (n,) each; pairs do not reach across them.
            vocabulary: V, rows of the table.
            successors: S at most.

        >>> pairs = Bigrams.count([torch.tensor([0, 1, 0, 1, 0, 2])], 4)
        >>> (pairs.of(torch.tensor([0]), torch.tensor([[1, 2, 3]]))[0] > 0).tolist()
        [True, True, False]
        """
        joined = [d.long()[:-1] * vocabulary + d.long()[1:] for d in documents if len(d) > 1]
        pairs, counts = torch.cat([*joined, torch.empty(0, dtype=torch.long)]).unique(return_counts=True)
        first, second = pairs // vocabulary, pairs % vocabulary
        single = torch.ones(vocabulary, dtype=torch.double).scatter_add(0, second, counts.double())
        single = single / single.sum()
        before = torch.zeros(vocabulary, dtype=torch.double).scatter_add(0, first, counts.double())
        value = ((counts + single[second]) / (before[first] + 1)).log() - single[second].log()
        # The most frequent first, by first token; the place of a pair is its rank among those of its first token.
        order = counts.argsort(descending=True, stable=True)
        order = order[first[order].argsort(stable=True)]
        start = torch.searchsorted(first[order], torch.arange(vocabulary))
        rank = torch.arange(len(order)) - start[first[order]]
        kept = order[rank < successors]
        place = first[kept], rank[rank < successors]
        width = int(place[1].max()) + 1 if len(kept) else 1
        table = torch.full((vocabulary, width), _NONE, dtype=torch.int32)
        bias = torch.zeros(vocabulary, width)
        table[place], bias[place] = second[kept].int(), value[kept].float()
        return cls(table, bias, (1 / (before + 1)).log().float())
