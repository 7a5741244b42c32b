"""Training on the packed row is training on every document and every block apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.contracts.checks import ROWS, PackedRow
from tests.contracts.families import family_pair
from tests.contracts.models import Pair
from tests.contracts.reference import block_logits, causal_logits


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_loss(pair: Pair, row: PackedRow) -> Tensor:
    clean, masked = row.logits(pair, row.ids)
    loss = torch.zeros(())
    for document in row.documents():
        text = row.ids[document]
        loss = loss + F.cross_entropy(clean[document][:-1], text[1:], reduction="sum")
        loss = loss + F.cross_entropy(masked[document], text, reduction="sum")
    return loss


def separate_losses(pair: Pair, row: PackedRow) -> Tensor:
    loss = torch.zeros(())
    for document in row.documents():
        text = row.ids[document]
        loss = loss + F.cross_entropy(causal_logits(pair.plain, text)[:-1], text[1:], reduction="sum")
    for document, start, end in row.blocks():
        text = row.ids[document]
        logits = block_logits(pair.plain, text[:start], end - start)
        loss = loss + F.cross_entropy(logits, text[start:end], reduction="sum")
    return loss


@pytest.mark.parametrize("kind", ["one document", "padding"])
def test_gradients_of_a_packed_row_are_the_sum_of_separate_runs(pair: Pair, kind: str) -> None:
    assert_same_gradients(pair, ROWS[kind])


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gemma4_text", "gpt_oss", "granitemoe_swa", "inkling_text", "lfm2_moe", "llama4_text"]
)
def test_so_they_are_through_sinks_convolutions_positions_and_latent_attention(family: str) -> None:
    assert_same_gradients(family_pair(family), ROWS["offset 3 in several documents"], tolerance=1e-4)


def assert_same_gradients(pair: Pair, row: PackedRow, tolerance: float = 1e-5) -> None:
    packed = gradients(pair.layout.model, packed_loss(pair, row))
    separate = gradients(pair.plain, separate_losses(pair, row))

    assert packed.keys() == separate.keys()
    moved = [name for name, gradient in separate.items() if gradient.norm() > 1e-3]
    assert len(moved) >= 0.85 * len(separate), "nearly every parameter must take part"
    total = torch.stack([gradient.norm() for gradient in separate.values()]).norm()
    for name, expected in separate.items():
        difference = (packed[name] - expected).norm()
        # A parameter whose gradient is tiny beside the others' carries their rounding.
        assert difference <= tolerance * max(expected.norm(), 1e-2 * total), (name, difference, expected.norm(), total)
