"""Packed rows: every document once an epoch, never cut, and resumable at any batch."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.one_pass import one_pass
from zconvert.data.documents import Document, Documents
from zconvert.data.packing import Batch, PackedRows
from zconvert.errors import UserError

PAD = 0


def documents_of(lengths: list[int]) -> Documents:
    """Documents whose tokens tell where they stood: document d has 1000·(d+1), 1000·(d+1) + 1 …; the first is BOS."""
    return Documents.of(
        Document([1000 * (d + 1) + i for i in range(length)], [i > 0 for i in range(length)])
        for d, length in enumerate(lengths)
    )


def rows_of(lengths: list[int], **changes: Any) -> PackedRows:
    options = {"sequence_len": 8, "rows": 2, "seed": 0, "sample_packing": True, "pad_token_id": PAD} | changes
    return PackedRows(documents_of(lengths), **options)


def segments(batch: Batch) -> list[tuple[int, ...]]:
    """The documents in a batch, read from its document_ids."""
    found = []
    for ids, numbers in zip(batch.input_ids, batch.document_ids, strict=True):
        for number in range(int(numbers.max()) + 1):
            found.append(tuple(ids[numbers == number].tolist()))
    return found


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "document_ids", "loss_mask"))


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=12)


@given(lengths=LENGTHS, seed=st.integers(0, 9), sample_packing=st.booleans())
@settings(max_examples=40, deadline=None)
def test_documents_are_whole_and_pieces_of_long_ones_are_full(
    lengths: list[int], seed: int, sample_packing: bool
) -> None:
    documents = documents_of(lengths)
    rows = rows_of(lengths, seed=seed, sample_packing=sample_packing)
    allowed = set()
    for d in range(len(documents)):
        ids = documents.tokens(d)[0].tolist()
        allowed |= {tuple(ids[start : start + 8]) for start in range(0, len(ids), 8)}
    for _ in range(10):
        batch = rows.next_batch()
        assert batch.input_ids.shape == batch.document_ids.shape == batch.loss_mask.shape == (2, 8)
        assert batch.input_ids.dtype == batch.document_ids.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.bool
        assert set(segments(batch)) <= allowed
        padding = batch.document_ids == -1
        assert torch.equal(batch.input_ids == PAD, padding)
        assert torch.equal(batch.loss_mask, ~padding & (batch.input_ids % 1000 != 0))
        # Padding stands on the right only, and documents are numbered from 0 in the order in which they stand.
        steps = batch.document_ids.diff()
        assert ((steps == 0) | (steps == 1) | padding[:, 1:]).all()
        assert (batch.document_ids[:, 0] == 0).all()
        if not sample_packing:
            assert batch.document_ids.max() == 0


@given(lengths=LENGTHS, seed=st.integers(0, 9), sample_packing=st.booleans(), batches=st.integers(0, 25))
@settings(max_examples=60, deadline=None)
def test_batches_after_a_restored_position_are_identical(
    lengths: list[int], seed: int, sample_packing: bool, batches: int
) -> None:
    uninterrupted = rows_of(lengths, seed=seed, sample_packing=sample_packing)
    for _ in range(batches):
        uninterrupted.next_batch()
    state = json.loads(json.dumps(uninterrupted.state_dict()))
    resumed = rows_of(lengths, seed=seed, sample_packing=sample_packing)
    resumed.next_batch()  # whatever it did before does not matter
    resumed.load_state_dict(state)
    for _ in range(12):
        assert equal(resumed.next_batch(), uninterrupted.next_batch())


@pytest.mark.parametrize("sample_packing", [True, False])
def test_each_epoch_reads_every_document_once_in_an_order_of_its_own(sample_packing: bool) -> None:
    lengths = [5] * 40  # one document fits a row of 8, so rows leave in the order in which documents were read
    rows = rows_of(lengths, sample_packing=sample_packing)
    read = [segments(rows.next_batch()) for _ in range(40)]
    order = [document[0] for batch in read for document in batch]
    first, second = order[:40], order[40:]
    assert Counter(first) == Counter(second) == Counter(1000 * (d + 1) for d in range(40))
    assert first != second
    assert first != sorted(first)


def test_the_seed_fixes_the_order() -> None:
    lengths = [3, 5, 2, 7, 4] * 4
    first, same, other = (rows_of(lengths, seed=seed).next_batch() for seed in (0, 0, 1))
    assert equal(first, same)
    assert not equal(first, other)


def test_packing_fills_rows_well() -> None:
    rows = rows_of([3, 5, 2, 7, 4, 6, 1] * 30, sequence_len=32)
    filled = torch.cat([rows.next_batch().document_ids for _ in range(10)]) >= 0
    assert filled.float().mean() > 0.95


def test_data_that_changed_since_is_refused_and_another_batch_size_is_not() -> None:
    state = rows_of([3, 4]).state_dict()
    for changed, name in (
        (rows_of([3, 5]), "documents"),
        (rows_of([3, 4], sequence_len=16), "sequence_len"),
        (rows_of([3, 4], seed=1), "seed"),
    ):
        with pytest.raises(UserError, match=f"cannot be resumed: its {name} changed"):
            changed.load_state_dict(state)
    rows_of([3, 4], rows=5).load_state_dict(state)


@pytest.mark.parametrize("sample_packing", [True, False])
def test_packing_keeps_every_token_exactly_once(sample_packing: bool) -> None:
    lengths = [3, 20, 8, 1, 5]
    batches = list(
        one_pass(documents_of(lengths), sequence_len=8, rows=2, sample_packing=sample_packing, pad_token_id=PAD)
    )
    tokens = Counter(token for batch in batches for document in segments(batch) for token in document)
    assert tokens == Counter(documents_of(lengths).ids.tolist())


def test_no_documents_are_a_clear_error() -> None:
    with pytest.raises(UserError, match="no documents"):
        rows_of([])


@pytest.mark.parametrize(("world", "rows"), [(2, 3), (3, 2), (6, 1)])
def test_ranks_share_the_rows_that_one_rank_would_have(world: int, rows: int) -> None:
    lengths = [3, 5, 2, 7, 4, 20, 1] * 5
    alone = rows_of(lengths, rows=world * rows)
    ranks = [rows_of(lengths, rows=rows, rank=rank, world=world) for rank in range(world)]
    for _ in range(8):
        whole, parts = alone.next_batch(), [rank.next_batch() for rank in ranks]
        for name in ("input_ids", "document_ids", "loss_mask"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_a_position_of_two_ranks_goes_on_with_one_and_with_four() -> None:
    lengths = [3, 5, 2, 7, 4, 20, 1] * 5
    alone, two = rows_of(lengths, rows=4), [rows_of(lengths, rank=rank, world=2) for rank in range(2)]
    for _ in range(5):
        alone.next_batch()
        for rank in two:
            rank.next_batch()
    state = two[0].state_dict()
    one = rows_of(lengths, rows=4)
    four = [rows_of(lengths, rows=1, rank=rank, world=4) for rank in range(4)]
    for rank in (one, *four):
        rank.load_state_dict(json.loads(json.dumps(state)))
    for _ in range(5):
        expected = alone.next_batch().input_ids
        assert torch.equal(one.next_batch().input_ids, expected)
        assert torch.equal(torch.cat([rank.next_batch().input_ids for rank in four]), expected)
