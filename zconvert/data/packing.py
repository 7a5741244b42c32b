"""Documents -> rows of equal length, endlessly, in an order that the seed fixes and that can be resumed anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zconvert.data.documents import Documents
from zconvert.data.streams import DocumentStream, Piece, Shuffled
from zconvert.errors import UserError
from zconvert.tidar.layout import PADDING

OPEN_ROWS = 16
"""rows that are filled at the same time; more packs tighter and delays documents longer"""


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
        references: by which the stream finds the documents again, row after row; empty where nobody asks.
    """

    input_ids: Tensor
    document_ids: Tensor
    loss_mask: Tensor
    references: tuple[list[Any], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        ids, documents, scored = (t.to(device) for t in (self.input_ids, self.document_ids, self.loss_mask))
        return Batch(ids, documents, scored, self.references)


class _Packer:
    """First fit: a piece goes to the oldest open row with room; where none has and all are open, the oldest leaves."""

    def __init__(self, sequence_len: int, open_rows: int) -> None:
        self.sequence_len = sequence_len
        self.open_rows = open_rows
        self.rows: list[list[Piece]] = []
        self.room: list[int] = []

    def add(self, piece: Piece) -> list[Piece] | None:
        """Places a piece; returns the row that this finished, or that had to leave for it, if any."""
        if len(piece) == self.sequence_len:
            return [piece]
        for number, room in enumerate(self.room):
            if len(piece) <= room:
                self.rows[number].append(piece)
                self.room[number] -= len(piece)
                return self._pop(number) if not self.room[number] else None
        leaving = self._pop(0) if len(self.rows) == self.open_rows else None
        self.rows.append([piece])
        self.room.append(self.sequence_len - len(piece))
        return leaving

    def _pop(self, number: int) -> list[Piece]:
        self.room.pop(number)
        return self.rows.pop(number)


class PackedRows:
    """Endless batches of packed rows over shuffled epochs.

    Documents are never cut, unless one is longer than a row: then it becomes pieces of `sequence_len` tokens, which
    stand as documents of their own. Rows are padded on the right. An epoch's order depends on seed and epoch alone.

    There is one order of rows, whatever the number of ranks: every rank packs all of them, which takes lengths alone,
    and copies the tokens of its own. So the position is the same on every rank, and one that was saved with two ranks
    goes on with one or with four.

    >>> from zconvert.data.documents import Document
    >>> documents = Documents.of([Document([5, 6], [True, True]), Document([7], [True])])
    >>> rows = PackedRows(documents, sequence_len=4, rows=1, seed=0, sample_packing=True, pad_token_id=0)
    >>> rows.next_batch().document_ids.shape
    torch.Size([1, 4])
    """

    def __init__(
        self,
        documents: Documents | DocumentStream,
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
            documents: what to pack, at least one document; or a stream of them, which has its own order.
            sequence_len: T, tokens per row.
            rows: R, rows per batch.
            seed: fixes the order of documents that are no stream yet.
            sample_packing: several documents per row; else one document (or piece) per row.
            pad_token_id: id that fills rows up.
            rank: of this process, from 0 to `world` - 1.
            world: processes that share the rows.

        Raises:
            UserError: there are no documents.
        """
        self.stream = Shuffled([documents], seed) if isinstance(documents, Documents) else documents
        self.sequence_len = sequence_len
        self.rows = rows
        self.sample_packing = sample_packing
        self.pad_token_id = pad_token_id
        self.rank = rank
        self.world = world
        # A row may also wait here: splitting a long document can finish several at once.
        self._ready: list[list[Piece]] = []
        self._packer = _Packer(sequence_len, OPEN_ROWS)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """This rank's R of the next R · world rows."""
        count = self.rows * self.world
        while len(self._ready) < count:
            self._read_document()
        taken, self._ready = self._ready[:count], self._ready[count:]
        mine = taken[self.rank * self.rows : (self.rank + 1) * self.rows]
        return _make_batch(mine, self.sequence_len, self.pad_token_id)

    def documents_of(self, batch: Batch) -> list[str]:
        """The documents of a batch, in words."""
        return list(dict.fromkeys(map(self.stream.name, batch.references)))

    def state_dict(self) -> dict[str, Any]:
        """The exact position, the same on every rank: numbers, text and lists, and tokens of streams as tensors."""
        return {
            "data": self._data(),
            "stream": self.stream.state_dict(),
            "ready": [_references(row) for row in self._ready],
            "open": [_references(row) for row in self._packer.rows],
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
        self.stream.load_state_dict(state["stream"])
        self._ready = [self._pieces(row) for row in state["ready"]]
        self._packer = _Packer(self.sequence_len, OPEN_ROWS)
        for row in state["open"]:
            pieces = self._pieces(row)
            self._packer.rows.append(pieces)
            self._packer.room.append(self.sequence_len - sum(len(piece) for piece in pieces))

    def _read_document(self) -> None:
        document = self.stream.next_document()
        for start, length in _cuts(len(document), self.sequence_len):
            piece = document if length == len(document) else self.stream.part(document.reference, start, length)
            row = self._packer.add(piece) if self.sample_packing else [piece]
            if row is not None:
                self._ready.append(row)

    def _pieces(self, references: list[list[Any]]) -> list[Piece]:
        return [self.stream.piece(reference) for reference in references]

    def _data(self) -> dict[str, Any]:
        return {
            **self.stream.identity(),
            "sequence_len": self.sequence_len,
            "sample_packing": self.sample_packing,
        }


def _make_batch(rows: list[list[Piece]], sequence_len: int, pad_token_id: int) -> Batch:
    """Copies the pieces of each row into the three tensors of a batch."""
    shape = (len(rows), sequence_len)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    document_ids = torch.full(shape, PADDING, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        at = 0
        for document_id, piece in enumerate(row):
            here = slice(at, at + len(piece))
            input_ids[r, here] = piece.ids.long()
            document_ids[r, here] = document_id
            loss_mask[r, here] = piece.loss_mask
            at += len(piece)
    references = tuple(piece.reference for row in rows for piece in row)
    return Batch(input_ids, document_ids, loss_mask, references)


def _cuts(length: int, sequence_len: int) -> Iterator[tuple[int, int]]:
    """Start and length of the pieces of a document."""
    for start in range(0, length, sequence_len):
        yield start, min(sequence_len, length - start)


def _references(row: list[Piece]) -> list[list[Any]]:
    return [piece.reference for piece in row]
