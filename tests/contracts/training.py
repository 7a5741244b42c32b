"""Trains a tiny model for a few seconds on a language so plain that drafts are accepted."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.contracts.checks import BLOCK
from tests.contracts.models import MASK, Pair, make_model, pair_of
from zconvert.tidar.layout import packed_layout
from zconvert.tidar.model import LayoutModel

CYCLE = 12  # tokens 0 … 11 stand on a circle; a text walks round it by a step of its own


def circular_texts(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """(rows, length) texts: a random start, then a constant step of 1, 2 or 3 round the circle."""
    start = torch.randint(0, CYCLE, (rows, 1), generator=generator)
    step = torch.randint(1, 4, (rows, 1), generator=generator)
    return (start + step * torch.arange(length)) % CYCLE


@cache
def trained_pair(name: str, steps: int = 110, rows: int = 8, length: int = 24, peak: float = 1e-2) -> Pair:
    """Both losses on packed rows, over what can be foretold: all but a text's first two tokens.

    Made once in a session: tests leave it as it is.
    """
    layout_model = LayoutModel(make_model(name, initializer_range=0.15))
    model = layout_model.model.train()
    generator = torch.Generator().manual_seed(0)
    layout = packed_layout(torch.zeros(rows, length, dtype=torch.long), BLOCK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 10) * (1 - step / steps)
        ids = circular_texts(rows, length, generator)
        hidden = layout_model.hidden_states(torch.cat([ids, torch.full_like(ids, MASK)], dim=1), layout)
        clean, masked = layout_model.logits(hidden).split(length, dim=1)
        loss = F.cross_entropy(clean[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
        loss = loss + F.cross_entropy(masked[:, BLOCK:].flatten(0, 1), ids[:, BLOCK:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # The weights go to a fresh model, so that the plain one was never touched by a graft.
    plain = make_model(name)
    plain.load_state_dict(model.state_dict())
    return pair_of(name, plain)
