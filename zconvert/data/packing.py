"""Documents -> rows of equal length, endlessly, in an order that the seed fixes and that can be resumed anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zconvert.data.documents import Documents
from zconvert.errors import UserError

OPEN_ROWS = 16
"""rows that are filled at the same time; more packs tighter and delays documents longer"""
PADDING = -1
"""document_id of padding"""


@dataclass(frozen=True)
class Batch:
    """R rows of T tokens each.

    ```
    input_ids     a a a b b _     document a, document b, padding
    document_ids  0 0 0 1 1 -1
    loss_mask     . 1 1 . 1 .     a and b begin with BOS, which is not scored
    ```

    Args:
        input_ids: (R, T) int64, `pad_token_id` at padding.
        document_ids: (R, T) int64, from 0 in each row, -1 at padding.
        loss_mask: (R, T) bool, whether the token is scored as a target; False at padding.
    """

    input_ids: Tensor
    document_ids: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class _Piece:
    """A document, or one of the parts of a document longer than a row."""

    document: int
    start: int
    length: int


class _Packer:
    """First fit: a piece goes to the oldest open row with room; where none has and all are open, the oldest leaves."""

    def __init__(self, sequence_len: int, open_rows: int) -> None:
        self.sequence_len = sequence_len
        self.open_rows = open_rows
        self.rows: list[list[_Piece]] = []
        self.room: list[int] = []

    def add(self, piece: _Piece) -> list[_Piece] | None:
        """Places a piece; returns the row that this finished, or that had to leave for it, if any."""
        if piece.length == self.sequence_len:
            return [piece]
        for number, room in enumerate(self.room):
            if piece.length <= room:
                self.rows[number].append(piece)
                self.room[number] -= piece.length
                return self._pop(number) if not self.room[number] else None
        leaving = self._pop(0) if len(self.rows) == self.open_rows else None
        self.rows.append([piece])
        self.room.append(self.sequence_len - piece.length)
        return leaving

    def _pop(self, number: int) -> list[_Piece]:
        self.room.pop(number)
        return self.rows.pop(number)


class PackedRows:
    """Endless batches of packed rows over shuffled epochs.

    Documents are never cut, unless one is longer than a row: then it becomes pieces of `sequence_len` tokens, which
    stand as documents of their own. Rows are padded on the right. An epoch's order depends on seed and epoch alone.

    >>> from zconvert.data.documents import Document
    >>> documents = Documents.of([Document([5, 6], [True, True]), Document([7], [True])])
    >>> rows = PackedRows(documents, sequence_len=4, rows=1, seed=0, sample_packing=True, pad_token_id=0)
    >>> rows.next_batch().document_ids.shape
    torch.Size([1, 4])
    """

    def __init__(
        self,
        documents: Documents,
        *,
        sequence_len: int,
        rows: int,
        seed: int,
        sample_packing: bool,
        pad_token_id: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Starts before the first batch.

        Args:
            documents: what to pack, at least one document.
            sequence_len: T, tokens per row.
            rows: R, rows per batch.
            seed: fixes the order.
            sample_packing: several documents per row; else one document (or piece) per row.
            pad_token_id: id that fills rows up.
            rank: this reader's number among those that share the rows.
            world: number of these readers; the rows of their next batches are the next of the one order, dealt in turn.

        Raises:
            UserError: there are no documents.
        """
        _check(documents)
        self.rank, self.world = rank, world
        self.documents = documents
        self.sequence_len = sequence_len
        self.rows = rows
        self.seed = seed
        self.sample_packing = sample_packing
        self.pad_token_id = pad_token_id
        self.epoch = 0
        """epoch of the document that is read next, from 0"""
        self._at = 0  # how many documents of the epoch's order were read
        self._order = self._epoch_order(0)
        # A row may also wait here: splitting a long document can finish several at once.
        self._ready: list[list[_Piece]] = []
        self._packer = _Packer(sequence_len, OPEN_ROWS)
        self._fingerprint: str | None = None

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next R rows."""
        everyone = self.rows * self.world
        while len(self._ready) < everyone:
            self._read_document()
        batch, self._ready = self._ready[:everyone], self._ready[everyone:]
        return _make_batch(self.documents, batch[self.rank :: self.world], self.sequence_len, self.pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """The exact position: numbers, text and lists only, so that it can be stored as JSON."""
        return {
            "data": self._data(),
            "epoch": self.epoch,
            "at": self._at,
            "ready": [_as_lists(row) for row in self._ready],
            "open": [_as_lists(row) for row in self._packer.rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position from `state_dict`; the batches that follow are the ones that followed there.

        Raises:
            UserError: the data, or how it is packed, is not what it was when the state was taken.
        """
        now, then = self._data(), state["data"]
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            raise UserError(
                f"the run cannot be resumed: its {' and '.join(changed)} changed",
                found=", ".join(f"{name} {now[name]}" for name in changed),
                expected=", ".join(f"{name} {then.get(name)}" for name in changed),
                fix="restore datasets and settings, or start anew with another output_dir",
            )
        self.epoch, self._at = state["epoch"], state["at"]
        self._order = self._epoch_order(self.epoch)
        self._ready = [[_Piece(*piece) for piece in row] for row in state["ready"]]
        self._packer = _Packer(self.sequence_len, OPEN_ROWS)
        for row in state["open"]:
            pieces = [_Piece(*piece) for piece in row]
            self._packer.rows.append(pieces)
            self._packer.room.append(self.sequence_len - sum(piece.length for piece in pieces))

    def _read_document(self) -> None:
        if self._at == len(self.documents):
            self.epoch, self._at = self.epoch + 1, 0
            self._order = self._epoch_order(self.epoch)
        number = int(self._order[self._at])
        self._at += 1
        for piece in _pieces(self.documents, number, self.sequence_len):
            row = self._packer.add(piece) if self.sample_packing else [piece]
            if row is not None:
                self._ready.append(row)

    def _epoch_order(self, epoch: int) -> Tensor:
        # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        digest = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randperm(len(self.documents), generator=generator)

    def _data(self) -> dict[str, Any]:
        if self._fingerprint is None:
            self._fingerprint = self.documents.fingerprint()
        return {
            "documents": self._fingerprint,
            "sequence_len": self.sequence_len,
            "seed": self.seed,
            "sample_packing": self.sample_packing,
        }


def one_pass(
    documents: Documents, *, sequence_len: int, rows: int, sample_packing: bool, pad_token_id: int
) -> Iterator[Batch]:
    """Every document once, in order, for evaluation; the last batch may have fewer rows.

    Args:
        documents: at least one document.
        sequence_len: T, tokens per row.
        rows: R, rows per batch.
        sample_packing: several documents per row; else one document (or piece) per row.
        pad_token_id: id that fills rows up.

    Raises:
        UserError: there are no documents.
    """
    _check(documents)
    packer = _Packer(sequence_len, OPEN_ROWS)

    def finished() -> Iterator[list[_Piece]]:
        for number in range(len(documents)):
            for piece in _pieces(documents, number, sequence_len):
                row = packer.add(piece) if sample_packing else [piece]
                if row is not None:
                    yield row
        yield from packer.rows

    batch: list[list[_Piece]] = []
    for row in finished():
        batch.append(row)
        if len(batch) == rows:
            yield _make_batch(documents, batch, sequence_len, pad_token_id)
            batch = []
    if batch:
        yield _make_batch(documents, batch, sequence_len, pad_token_id)


def _make_batch(documents: Documents, rows: list[list[_Piece]], sequence_len: int, pad_token_id: int) -> Batch:
    """Copies the pieces of each row into the three tensors of a batch."""
    shape = (len(rows), sequence_len)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    document_ids = torch.full(shape, PADDING, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        at = 0
        for document_id, piece in enumerate(row):
            ids, scored = documents.tokens(piece.document)
            here, there = slice(at, at + piece.length), slice(piece.start, piece.start + piece.length)
            input_ids[r, here] = ids[there].long()
            document_ids[r, here] = document_id
            loss_mask[r, here] = scored[there]
            at += piece.length
    return Batch(input_ids, document_ids, loss_mask)


def _check(documents: Documents) -> None:
    if not len(documents):
        raise UserError("there are no documents to pack", fix="check datasets[].path in the recipe")


def _pieces(documents: Documents, number: int, sequence_len: int) -> Iterator[_Piece]:
    length = documents.length(number)
    for start in range(0, length, sequence_len):
        yield _Piece(number, start, min(sequence_len, length - start))


def _as_lists(row: list[_Piece]) -> list[list[int]]:
    return [[piece.document, piece.start, piece.length] for piece in row]
