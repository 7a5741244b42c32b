"""Tokenised documents, in memory or in a folder on disk that is read as it is needed: 5 bytes a token, 8 a document."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zconvert.checkpoint.folder import new_folder
from zconvert.errors import UserError
from zconvert.formats import TOKENISED, up_to_date

_TYPES = {"ids": torch.int32, "loss_mask": torch.bool, "ends": torch.int64}
_FILE = "documents.json"
_FLUSH_TOKENS = 1_000_000


@dataclass(frozen=True)
class Document:
    """One tokenised document.

    Args:
        ids: token ids.
        loss_mask: for each token, whether it is scored as a target. The BOS token is not: nobody has to predict it.
    """

    ids: list[int]
    loss_mask: list[bool]


class Documents:
    """Tokenised documents as one int32 array.

    >>> documents = Documents.of([Document([5, 6, 7], [False, True, True]), Document([8], [True])])
    >>> len(documents), documents.token_count, documents.length(0)
    (2, 4, 3)
    """

    def __init__(self, ids: Tensor, loss_mask: Tensor, ends: Tensor, fingerprint: str | None = None) -> None:
        """Takes the arrays as they are.

        Args:
            ids: (N,) int32, all documents' tokens one after another.
            loss_mask: (N,) bool.
            ends: (documents,) int64, where each document ends in these.
            fingerprint: their hash, where known.
        """
        self.ids = ids
        self.loss_mask = loss_mask
        self.ends = ends
        self._fingerprint = fingerprint

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Documents:
        """Collects documents into arrays in memory."""
        ids, scored, ends = array("i"), array("B"), array("q")
        for document in documents:
            ids.extend(document.ids)
            scored.extend(document.loss_mask)
            ends.append(len(ids))
        return cls(_tensor(ids, torch.int32), _tensor(scored, torch.bool), _tensor(ends, torch.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def token_count(self) -> int:
        """Tokens in all documents together."""
        return len(self.ids)

    def length(self, number: int) -> int:
        """Tokens of one document."""
        start, end = self._span(number)
        return end - start

    def tokens(self, number: int) -> tuple[Tensor, Tensor]:
        """One document's ids (length,) int32 and loss_mask (length,) bool; views, not to be written to."""
        start, end = self._span(number)
        return self.ids[start:end], self.loss_mask[start:end]

    def fingerprint(self) -> str:
        """A hash of contents and boundaries; a resumed run compares it, so that it reads what it read before."""
        if self._fingerprint is None:
            parts = (self.ids, self.loss_mask, self.ends)
            self._fingerprint = _combined([hashlib.sha256(part.numpy().data) for part in parts])
        return self._fingerprint

    def _span(self, number: int) -> tuple[int, int]:
        return int(self.ends[number - 1]) if number else 0, int(self.ends[number])


def _tensor(values: array[int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def _combined(digests: list[Any]) -> str:
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def write_documents(folder: Path, documents: Iterable[Document], about: dict[str, Any] | None = None) -> None:
    """Writes documents into a folder that appears when it is whole; they are never all in memory.

    ```
    FOLDER/ids.bin  loss_mask.bin  ends.bin    the three arrays of `Documents`, as they are in memory
           documents.json                      how many, their hash, and what else is to be kept of them
    ```

    Args:
        folder: must not exist.
        documents: what to write.
        about: further entries of `documents.json`.

    Raises:
        UserError: `folder` exists or cannot be written.
    """
    digests = [hashlib.sha256() for _ in _TYPES]
    count = tokens = highest = 0
    with new_folder(folder) as temporary:
        files = [(temporary / f"{name}.bin").open("wb") for name in _TYPES]
        try:
            buffers: tuple[array[int], ...] = (array("i"), array("B"), array("q"))

            def flush() -> None:
                for file, digest, buffer in zip(files, digests, buffers, strict=True):
                    digest.update(buffer)
                    file.write(buffer)
                    del buffer[:]

            for document in documents:
                buffers[0].extend(document.ids)
                buffers[1].extend(document.loss_mask)
                tokens += len(document.ids)
                highest = max(highest, max(document.ids))
                buffers[2].append(tokens)
                count += 1
                if len(buffers[0]) >= _FLUSH_TOKENS:
                    flush()
            flush()
        finally:
            for file in files:
                file.close()
        facts = {
            "format_version": TOKENISED,
            "documents": count,
            "tokens": tokens,
            "highest_id": highest,
            "fingerprint": _combined(digests),
            **(about or {}),
        }
        (temporary / _FILE).write_text(json.dumps(facts, indent=2) + "\n")


def read_documents(folder: Path) -> tuple[Documents, dict[str, Any]]:
    """Documents that `write_documents` wrote, mapped into memory, and what `documents.json` says.

    Raises:
        UserError: the folder is damaged, or was written by a newer zconvert.
    """
    try:
        facts = up_to_date(json.loads((folder / _FILE).read_text()), folder / _FILE, TOKENISED)
        counts = {"ids": facts["tokens"], "loss_mask": facts["tokens"], "ends": facts["documents"]}
        arrays = {name: _mapped(folder / f"{name}.bin", counts[name], dtype) for name, dtype in _TYPES.items()}
        return Documents(**arrays, fingerprint=facts["fingerprint"]), facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the tokenised documents in {folder} are damaged", found=error, fix="remove this folder; it is made anew"
        ) from error


def _mapped(path: Path, count: int, dtype: torch.dtype) -> Tensor:
    expected, found = count * dtype.itemsize, os.path.getsize(path)
    if expected != found:
        raise ValueError(f"{path.name} has {found:,} bytes instead of {expected:,}")
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype) if count else torch.empty(0, dtype=dtype)
