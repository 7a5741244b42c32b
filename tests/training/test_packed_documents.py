"""Rows from the packer through the losses: a document in a row is the document alone, and reaches no other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.models import shared_random_pair
from tests.data.one_pass import one_pass
from zconvert.data.documents import Document, Documents
from zconvert.data.packing import Batch, PackedRows
from zconvert.tidar.layout import PADDING
from zconvert.tidar.model import LayoutModel
from zconvert.training.objective import packed_losses

BLOCK, MASK, LENGTH = 4, 63, 16
NAMES = pytest.mark.parametrize("name", ["zaya_sliding", "qwen3_moe"])


def documents_of(*lengths: int) -> Documents:
    """Random texts of which every third token is not scored."""
    generator = torch.Generator().manual_seed(len(lengths))
    return Documents.of(
        Document(torch.randint(3, 60, (n,), generator=generator).tolist(), [i % 3 != 1 for i in range(n)])
        for n in lengths
    )


def batch_of(sample_packing: bool, *lengths: int) -> Batch:
    (batch,) = one_pass(
        documents_of(*lengths), sequence_len=LENGTH, rows=9, sample_packing=sample_packing, pad_token_id=0
    )
    return batch


def losses(model: LayoutModel, batch: Batch) -> tuple[Tensor, Tensor]:
    sums = packed_losses(model, batch, mask_token_id=MASK, block_size=BLOCK)
    return sums.ar, sums.diffusion


def alone(batch: Batch, row: int, document: int) -> Batch:
    """One document (or piece) of a row, without padding and company."""
    here = batch.document_ids[row] == document
    ids, scored = batch.input_ids[row][here][None], batch.loss_mask[row][here][None]
    return Batch(ids, torch.zeros_like(ids), scored)


def pieces(batch: Batch) -> list[tuple[int, int]]:
    return [(r, d) for r, numbers in enumerate(batch.document_ids) for d in range(int(numbers.max()) + 1)]


@NAMES
@pytest.mark.parametrize("sample_packing", [True, False])
def test_the_losses_and_gradients_of_packed_rows_are_those_of_each_document_alone(
    name: str, sample_packing: bool
) -> None:
    model, batch = shared_random_pair(name).layout, batch_of(sample_packing, 5, 9, 1, 3, 21, 16, 6)
    assert (batch.document_ids == PADDING).any()
    weights = [p for p in model.model.parameters() if p.requires_grad]

    def gradients(batches: list[Batch]) -> tuple[Tensor, Tensor, list[Any]]:
        sums = [losses(model, batch) for batch in batches]
        ar, diffusion = (torch.stack(part).sum() for part in zip(*sums, strict=True))
        return ar.detach(), diffusion.detach(), list(torch.autograd.grad(ar + diffusion, weights, allow_unused=True))

    together = gradients([batch])
    apart = gradients([alone(batch, row, document) for row, document in pieces(batch)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@NAMES
def test_nothing_of_a_document_reaches_another_ones_losses(name: str) -> None:
    model, batch = shared_random_pair(name).layout, batch_of(True, 5, 9, 1, 3, 21, 16, 6)
    with torch.no_grad():
        for row, document in pieces(batch):
            here = torch.zeros_like(batch.loss_mask)
            here[row] = batch.document_ids[row] == document
            others = dataclasses.replace(batch, loss_mask=batch.loss_mask & ~here)
            changed = dataclasses.replace(
                others, input_ids=torch.where(here, 59 - batch.input_ids % 50, batch.input_ids)
            )
            torch.testing.assert_close(losses(model, changed), losses(model, others), rtol=1e-5, atol=1e-5)


@NAMES
def test_padding_is_neither_scored_nor_attended(name: str) -> None:
    model, batch = shared_random_pair(name).layout, batch_of(False, 5, 9, 1)
    padding = batch.document_ids == PADDING
    assert not (batch.loss_mask & padding).any()
    other = dataclasses.replace(batch, input_ids=torch.where(padding, 17, batch.input_ids))
    with torch.no_grad():
        torch.testing.assert_close(losses(model, other), losses(model, batch), rtol=0, atol=0)


def test_a_long_documents_pieces_know_nothing_of_one_another() -> None:
    """A document longer than a row is cut, and each part stands as a document of its own."""
    rows = PackedRows(
        documents_of(LENGTH + 5), sequence_len=LENGTH, rows=1, seed=0, sample_packing=True, pad_token_id=0
    )
    ids = documents_of(LENGTH + 5).ids.long()
    first, second = rows.next_batch(), rows.next_batch()
    assert torch.equal(first.input_ids[0], ids[:LENGTH])
    # The rest of one epoch and the rest of the next share a row.
    assert torch.equal(second.input_ids[0], ids[:LENGTH])
    state = rows.state_dict()
    assert [reference for row in state["open"] for reference in row] == [[0, LENGTH, 5], [0, LENGTH, 5]]
