"""Endless streams of documents in an order that the seed fixes, each with a position that it can be taken up from.

A stream's position is a dict that goes into the train state. It never depends on ranks or workers: those that tokenise
run ahead of it, and what they prepared is prepared again.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from zconvert.data.documents import Document, Documents
from zconvert.data.reading import Position, Reader
from zconvert.data.tokenising import ROWS_AT_ONCE, BadRows, Outcome, Workers, result_of
from zconvert.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Tokens that stand together in a row: a document, or a part of one.

    Args:
        ids: (n,) int32; a view, not read before it is copied into a row.
        loss_mask: (n,) bool.
        reference: by which the stream finds it again: numbers of it, or, where there is no way back, the tokens.
    """

    ids: Tensor
    loss_mask: Tensor
    reference: list[Any]

    def __len__(self) -> int:
        return len(self.ids)


class DocumentStream(Protocol):
    """What a packer reads from."""

    def next_document(self) -> Piece:
        """The next document, whole."""

    def part(self, reference: list[Any], start: int, length: int) -> Piece:
        """Tokens `start` to `start + length` of the document that `reference` names."""

    def piece(self, reference: list[Any]) -> Piece:
        """The document or part that has this reference."""

    def name(self, reference: list[Any]) -> str:
        """The document that `reference` names, in words."""

    def identity(self) -> dict[str, Any]:
        """What the data are and how they are mixed, JSON-able; a position is only good for the same."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state_dict` was taken."""


def permutation(count: int, *key: object) -> Tensor:
    """(count,) an order fixed by the key; hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator)


class Shuffled:
    """Documents that are all at hand: each once an epoch, in an order of its own."""

    def __init__(self, parts: Sequence[Documents], seed: int | str) -> None:
        """Starts before the first document.

        Args:
            parts: documents of several datasets, shuffled as one.
            seed: fixes the order of every epoch.

        Raises:
            UserError: there are none.
        """
        self.parts = list(parts)
        self.seed = seed
        self._begins = [0]
        for part in self.parts:
            self._begins.append(self._begins[-1] + len(part))
        if not self._begins[-1]:
            raise UserError("there are no documents to pack", fix="check datasets[].path in the recipe")
        self.epoch = self._at = 0
        self._order = permutation(self._begins[-1], seed, 0)

    def next_document(self) -> Piece:
        """The next document."""
        if self._at == len(self._order):
            self.epoch, self._at = self.epoch + 1, 0
            self._order = permutation(len(self._order), self.seed, self.epoch)
        number = int(self._order[self._at])
        self._at += 1
        ids, scored = self._tokens(number)
        return Piece(ids, scored, [number, 0, len(ids)])

    def part(self, reference: list[Any], start: int, length: int) -> Piece:
        """A part of a document."""
        return self.piece([reference[0], reference[1] + start, length])

    def piece(self, reference: list[Any]) -> Piece:
        """By the document's number, and where in it."""
        number, start, length = reference
        ids, scored = self._tokens(number)
        return Piece(ids[start : start + length], scored[start : start + length], [number, start, length])

    def name(self, reference: list[Any]) -> str:
        """By its number from 1, in the order of its file."""
        part = bisect_right(self._begins, reference[0]) - 1
        return f"document {reference[0] - self._begins[part] + 1} of {self.parts[part].name}"

    def identity(self) -> dict[str, Any]:
        """Hashes of the documents, and the seed."""
        return {"documents": [part.fingerprint() for part in self.parts], "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Epoch and place in it."""
        return {"epoch": self.epoch, "at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes there."""
        self.epoch, self._at = state["epoch"], state["at"]
        self._order = permutation(len(self._order), self.seed, self.epoch)

    def _tokens(self, number: int) -> tuple[Tensor, Tensor]:
        part = bisect_right(self._begins, number) - 1
        return self.parts[part].tokens(number - self._begins[part])


class Streamed:
    """Documents read and tokenised as they are needed, shuffled block by block.

    A block is `block_rows` rows; the next one is tokenised while this one is used. The position is where the block
    begins, and the place in it: taken up, the block is read again.
    """

    def __init__(
        self,
        open_reader: Callable[[], Reader],
        number: int,
        workers: Workers,
        bad_rows: BadRows,
        *,
        block_rows: int,
        seed: int | str,
        identity: str,
        vocabulary_rows: int | None,
    ) -> None:
        """Reads nothing yet.

        Args:
            open_reader: finds the rows, from the first.
            number: of the dataset among the workers' rules.
            workers: tokenise.
            bad_rows: says what to do with bad rows.
            block_rows: rows that are shuffled together.
            seed: fixes the order.
            identity: a hash of the data and how they are tokenised.
            vocabulary_rows: see `check_ids`.
        """
        self._open, self._number, self._workers, self._bad_rows = open_reader, number, workers, bad_rows
        self._block_rows, self._seed, self._identity = block_rows, seed, identity
        self._vocabulary_rows = vocabulary_rows
        self._blocks: Iterator[_Block] | None = None
        self._start: dict[str, Any] = {"epoch": 0, "block": 0, "position": None}
        self._at = 0
        self._documents: list[Document] = []

    def next_document(self) -> Piece:
        """The next document.

        Raises:
            UserError: a whole epoch held none.
        """
        epoch = self._start["epoch"]
        while self._blocks is None or self._at == len(self._documents):
            if self._blocks is None:
                self._blocks = self._read(self._start)
            self._enter(next(self._blocks), 0)
            if self._start["epoch"] > epoch + 1:
                raise UserError(
                    "a streamed dataset holds no documents", found="bad rows alone", fix="check datasets[].path"
                )
        document = self._documents[self._at]
        self._at += 1
        ids = torch.tensor(document.ids, dtype=torch.int32)
        scored = torch.tensor(document.loss_mask)
        return Piece(ids, scored, [ids, scored])

    def part(self, reference: list[Any], start: int, length: int) -> Piece:
        """A part of a document; its tokens are copied, since a stored view would bring all of them along."""
        return self.piece([part[start : start + length].clone() for part in reference])

    def piece(self, reference: list[Any]) -> Piece:
        """The reference is the tokens: there is no way back to them."""
        ids, scored = reference
        return Piece(ids, scored, [ids, scored])

    def name(self, reference: list[Any]) -> str:
        """By its first tokens: there is no way back to its place."""
        return f"a streamed document that has the tokens {reference[0][:8].tolist()}"

    def identity(self) -> dict[str, Any]:
        """As given, with what fixes the order."""
        return {"stream": self._identity, "seed": self._seed, "shuffle_buffer_size": self._block_rows}

    def state_dict(self) -> dict[str, Any]:
        """Where the block begins, and the place in it."""
        return {**self._start, "at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes there: the block is read again."""
        self._start = {name: state[name] for name in self._start}
        self._blocks = self._read(self._start)
        self._documents, self._at = [], 0
        if state["at"]:
            self._enter(next(self._blocks), state["at"])

    def _enter(self, block: _Block, at: int) -> None:
        self._start, self._at = block.start, at
        documents = [document for outcome in self._bad_rows.good(block.outcomes()) for document in outcome]
        check_ids(max((max(document.ids) for document in documents), default=0), self._vocabulary_rows)
        order = permutation(len(documents), self._seed, block.start["epoch"], block.start["block"])
        self._documents = [documents[number] for number in order.tolist()]

    def _read(self, start: dict[str, Any]) -> Iterator[_Block]:
        """The blocks from a position on, each handed out when the next one is on its way to the workers."""
        epoch, block = start["epoch"], start["block"]
        position: Position | None = start["position"]
        ready: _Block | None = None
        while True:
            reader = self._open()
            rows = reader.rows(position)
            seen = position is not None
            while taken := list(islice(rows, self._block_rows)):
                seen = True
                batches = [taken[at : at + ROWS_AT_ONCE] for at in range(0, len(taken), ROWS_AT_ONCE)]
                futures = [self._workers.submit(self._number, batch) for batch in batches]
                begun = _Block({"epoch": epoch, "block": block, "position": position}, futures)
                position, block = reader.position, block + 1
                if ready is not None:
                    yield ready
                ready = begun
                if not self._workers.processes:  # nothing would happen in the meantime
                    yield ready
                    ready = None
            if not seen:
                raise UserError("a streamed dataset holds no rows", fix="check datasets[].path in the recipe")
            epoch, block, position = epoch + 1, 0, None


@dataclass
class _Block:
    """Rows on their way to documents, and the position before them."""

    start: dict[str, Any]
    futures: list[Future[list[Outcome]]]

    def outcomes(self) -> Iterator[Outcome]:
        for future in self.futures:
            yield from result_of(future)


class Mixture:
    """Several streams by weight: next comes the one that is furthest behind its share of the tokens.

    So the shares hold at every moment to within a document, and nothing is drawn at random.
    """

    def __init__(self, streams: Sequence[DocumentStream], weights: Sequence[float]) -> None:
        """Starts before the first document.

        Args:
            streams: at least one.
            weights: of each, relative to the others.
        """
        self.streams, self.weights = list(streams), list(weights)
        self.tokens_read = [0] * len(self.streams)

    def next_document(self) -> Piece:
        """The next document."""
        read = zip(self.tokens_read, self.weights, strict=True)
        number = min(enumerate(tokens / weight for tokens, weight in read), key=lambda item: (item[1], item[0]))[0]
        piece = self.streams[number].next_document()
        self.tokens_read[number] += len(piece)
        return _tagged(number, piece)

    def part(self, reference: list[Any], start: int, length: int) -> Piece:
        """A part of a document."""
        return _tagged(reference[0], self.streams[reference[0]].part(reference[1:], start, length))

    def piece(self, reference: list[Any]) -> Piece:
        """By the stream's number, and its own reference."""
        return _tagged(reference[0], self.streams[reference[0]].piece(reference[1:]))

    def name(self, reference: list[Any]) -> str:
        """As its stream names it."""
        return self.streams[reference[0]].name(reference[1:])

    def identity(self) -> dict[str, Any]:
        """The streams' own, and the weights."""
        return {"streams": [stream.identity() for stream in self.streams], "weights": self.weights}

    def state_dict(self) -> dict[str, Any]:
        """Where each stream stands, and what was read of it."""
        return {"tokens_read": list(self.tokens_read), "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes there."""
        self.tokens_read = list(state["tokens_read"])
        for stream, inner in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(inner)


def _tagged(number: int, piece: Piece) -> Piece:
    return Piece(piece.ids, piece.loss_mask, [number, *piece.reference])


def check_ids(highest: int, vocabulary_rows: int | None) -> None:
    """Refuses ids that the model has no embedding row for, here rather than in a forward.

    Raises:
        UserError: there is one.
    """
    if vocabulary_rows is not None and highest >= vocabulary_rows:
        raise UserError(
            "the tokenizer does not belong to the model",
            found=f"token id {highest} in the datasets",
            expected=f"ids below {vocabulary_rows}, the model's embedding rows",
            fix="use the tokenizer files that came with the checkpoint",
        )
