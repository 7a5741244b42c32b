"""All documents packed once, in order, by the packer that training uses: batches to look at."""

from __future__ import annotations

from collections.abc import Iterator

from zconvert.data.documents import Documents
from zconvert.data.packing import OPEN_ROWS, Batch, Piece, _cuts, _make_batch, _Packer


def one_pass(
    documents: Documents, *, sequence_len: int, rows: int, sample_packing: bool, pad_token_id: int
) -> Iterator[Batch]:
    """Every document once; the last batch may have fewer rows."""
    packer = _Packer(sequence_len, OPEN_ROWS)

    def finished() -> Iterator[list[Piece]]:
        for number in range(len(documents)):
            ids, scored = documents.tokens(number)
            for start, length in _cuts(len(ids), sequence_len):
                piece = Piece(ids[start : start + length], scored[start : start + length], [])
                row = packer.add(piece) if sample_packing else [piece]
                if row is not None:
                    yield row
        yield from packer.rows

    batch: list[list[Piece]] = []
    for row in finished():
        batch.append(row)
        if len(batch) == rows:
            yield _make_batch(batch, sequence_len, pad_token_id)
            batch = []
    if batch:
        yield _make_batch(batch, sequence_len, pad_token_id)
