"""Local files -> texts -> tokenised documents, in one compact array."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zconvert.errors import UserError
from zconvert.recipe import DatasetRecipe

_TEXTS_AT_ONCE = 1000
_SUFFIXES = (".jsonl", ".txt")
_SURROGATES = re.compile("[\ud800-\udfff]")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """Tokenises a list of texts; `["input_ids"]` of the answer holds a list of ids for each."""


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
    """Tokenised documents, kept as one int32 array: 5 bytes a token and 8 a document.

    >>> documents = Documents.of([Document([5, 6, 7], [False, True, True]), Document([8], [True])])
    >>> len(documents), documents.token_count, documents.length(0)
    (2, 4, 3)
    """

    def __init__(self, ids: Tensor, loss_mask: Tensor, ends: Tensor, empty: int = 0) -> None:
        """Takes the arrays as they are.

        Args:
            ids: (N,) int32, all documents' tokens one after another.
            loss_mask: (N,) bool.
            ends: (documents,) int64, where each document ends in these.
            empty: texts without any token, left out.
        """
        self.ids = ids
        self.loss_mask = loss_mask
        self.ends = ends
        self.empty = empty

    @classmethod
    def of(cls, documents: Iterable[Document], empty: int = 0) -> Documents:
        """Collects documents into arrays."""
        ids, scored, ends = array("i"), array("B"), array("q")
        for document in documents:
            ids.extend(document.ids)
            scored.extend(document.loss_mask)
            ends.append(len(ids))
        return cls(_tensor(ids, torch.int32), _tensor(scored, torch.bool), _tensor(ends, torch.int64), empty)

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
        digest = hashlib.sha256()
        for part in (self.ids, self.loss_mask, self.ends):
            digest.update(part.numpy().data)
        return digest.hexdigest()

    def _span(self, number: int) -> tuple[int, int]:
        return int(self.ends[number - 1]) if number else 0, int(self.ends[number])


def _tensor(values: array[int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def load_documents(
    datasets: Sequence[DatasetRecipe],
    tokenizer: Tokenizer,
    *,
    vocabulary_rows: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Documents:
    """Reads and tokenises every document of several datasets, in order.

    Args:
        datasets: entries of a recipe's `datasets:`.
        tokenizer: a transformers tokenizer.
        vocabulary_rows: embedding rows of the model; ids at or above it are refused here rather than in a forward.
        on_progress: called with the number of documents so far.

    Raises:
        UserError: a file is missing or a line cannot be read (with file and line), or there is no document at all.
    """
    empty = 0

    def documents() -> Iterator[Document]:
        nonlocal empty
        done = 0
        for dataset in datasets:
            for texts in _batches(read_texts(dataset)):
                for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                    if ids:
                        yield _document(ids, dataset, tokenizer)
                    else:
                        empty += 1
                done += len(texts)
                if on_progress is not None:
                    on_progress(done)

    loaded = Documents.of(documents())
    loaded.empty = empty
    if not len(loaded):
        raise UserError(
            "the datasets hold no documents",
            found=f"{empty} empty texts in {', '.join(dataset.path for dataset in datasets)}",
            fix="check datasets[].path in the recipe",
        )
    highest = int(loaded.ids.max())
    if vocabulary_rows is not None and highest >= vocabulary_rows:
        raise UserError(
            "the tokenizer does not belong to the model",
            found=f"token id {highest} in the datasets",
            expected=f"ids below {vocabulary_rows}, the model's embedding rows",
            fix="use the tokenizer files that came with the checkpoint",
        )
    return loaded


def read_texts(dataset: DatasetRecipe) -> Iterator[str]:
    """The texts of one dataset, file by file: `.jsonl` a text a line, `.txt` one text.

    Raises:
        UserError: there is no such file, or a line is not what it should be.
    """
    for path in _files(Path(dataset.path).expanduser()):
        try:
            if path.suffix == ".jsonl":
                yield from _json_lines(path, dataset.field)
            else:
                yield path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} cannot be read as text",
                found=f"byte {error.object[error.start]:#04x} at {error.start:,}",
                expected="UTF-8",
                fix="convert the file to UTF-8",
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read", found=error.strerror) from None


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"there is no dataset {path}", fix="check datasets[].path in the recipe")
    found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file()) if path.is_dir() else [path]
    if not found or found[0].suffix not in _SUFFIXES:
        raise UserError(
            f"dataset {path} is of no kind that can be read",
            found="a folder without such files" if path.is_dir() else f"a file named {path.name}",
            expected="a .jsonl or .txt file, or a folder of them",
            fix="convert it to JSON lines such as " + json.dumps({"text": "one document"}),
        )
    return found


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            fix = f"each line must be a JSON object with a text under {field!r} (datasets[].field in the recipe)"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{where} is not UTF-8", fix="convert the file to UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON", found=error, fix=fix) from None
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object", found=type(row).__name__, fix=fix)
            if field not in row:
                raise UserError(f"{where} lacks {field!r}", found="keys " + ", ".join(map(repr, row)), fix=fix)
            if not isinstance(row[field], str):
                raise UserError(f"{where}: {field!r} is no text", found=type(row[field]).__name__, fix=fix)
            if _SURROGATES.search(row[field]):
                raise UserError(f"{where}: {field!r} holds half a character (a lone surrogate)", fix="mend the text")
            yield row[field]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _TEXTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _document(ids: Sequence[int], dataset: DatasetRecipe, tokenizer: Tokenizer) -> Document:
    bos = tokenizer.bos_token_id if dataset.add_bos else None
    eos = tokenizer.eos_token_id if dataset.add_eos else None
    # A text that already carries the marks keeps them single.
    ids = [*([bos] if bos is not None and ids[0] != bos else []), *ids]
    ids += [eos] if eos is not None and ids[-1] != eos else []
    return Document(ids, [not (position == 0 and token == bos) for position, token in enumerate(ids)])
