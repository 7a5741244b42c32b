"""Rows of a dataset, from any position: local files line by line, Parquet files and the Hub by the `datasets` library.

A row is not looked into here, beyond where it ends: tokenising does that, in other processes where there are some.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zconvert.errors import UserError
from zconvert.recipe import DatasetRecipe

SUFFIXES = (".jsonl", ".parquet", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPECTED = f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, a folder of them, or a dataset's Hub id"

Position = dict[str, Any]
"""where a reader stands: numbers, text, lists and dicts only, so that it can be stored as JSON"""


@dataclass(frozen=True)
class RawRow:
    """A row as it was found.

    Args:
        where: for messages, such as `line 3 of train.jsonl`.
        value: a line of JSON or a whole text as bytes, or a row as a dict.
        too_long: its bytes, where they are more than wanted; `value` then has not all of them.
    """

    where: str
    value: bytes | dict[str, Any]
    is_json: bool = False
    too_long: int | None = None


# A part (a file, a split) from a position within it on: each row, and how to tell the position after it.
_Part = Callable[[Position | None], Iterator[tuple[RawRow, Callable[[], Position]]]]


class Reader:
    """Rows of all parts of one dataset, in order, once; `position` is after the row that was yielded last."""

    def __init__(self, parts: list[_Part], identity: list[Any], version: list[Any] | None = None) -> None:
        """Starts before the first row.

        Args:
            parts: files or splits, in order.
            identity: what tells this data from other data wherever it lies, JSON-able.
            version: what else changes when it is written anew on this machine.
        """
        self.identity = identity
        self.version = version or []
        self._parts = parts
        self._part = 0
        self._within: Callable[[], Position] | None = None

    @property
    def position(self) -> Position:
        """Where the next row is read."""
        return {"part": self._part, "within": self._within() if self._within is not None else None}

    def rows(self, position: Position | None = None) -> Iterator[RawRow]:
        """The rows from a position on; from the first where None.

        Raises:
            UserError: a file cannot be read.
        """
        start, within = (position["part"], position["within"]) if position is not None else (0, None)
        for part in range(start, len(self._parts)):
            for row, after in self._parts[part](within):
                self._part, self._within = part, after
                yield row
            within = None
        self._part, self._within = len(self._parts), None


def open_dataset(dataset: DatasetRecipe, path: str | None = None) -> Reader:
    """Finds what a dataset's entry means; a local file or folder comes before a Hub id.

    Args:
        dataset: an entry of a recipe's `datasets:`.
        path: what to read instead of its own path.

    Raises:
        UserError: there is no such data, or of no kind that can be read.
    """
    name = path if path is not None else dataset.path
    assert name is not None, "the recipe's checks let no entry without a path pass"
    if _may_be_on_hub(name):
        return _hub_reader(dataset, name)
    files = _files(Path(name).expanduser())
    limit = dataset.max_row_bytes
    kinds: dict[str, Callable[[Path], _Part]] = {
        ".jsonl": lambda path: lambda start: _lines(path, limit, start),
        ".txt": lambda path: lambda start: _whole(path, limit, start),
        ".parquet": lambda path: lambda start: _table(lambda: _parquet(path), str(path), start),
    }
    identity = [[file.name, file.stat().st_size] for file in files]
    version = [[str(file.resolve()), file.stat().st_mtime_ns] for file in files]
    return Reader([kinds[file.suffix](file) for file in files], identity, version)


def require_datasets(datasets: Iterable[DatasetRecipe]) -> None:
    """Refuses data of this machine that are not there or cannot be read; the Hub is not asked.

    Raises:
        UserError: some are not.
    """
    for dataset in datasets:
        name = dataset.path or dataset.prompts_path
        assert name is not None, "the recipe's checks let no entry without a path pass"
        if not _may_be_on_hub(name):
            _files(Path(name).expanduser())


def _may_be_on_hub(name: str) -> bool:
    local = Path(name).expanduser()
    return not local.exists() and _HUB_ID.fullmatch(name) is not None and local.suffix not in SUFFIXES


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"there is no dataset {path}", expected=_EXPECTED, fix="check datasets[].path in the recipe")
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
    if not found or found[0].suffix not in SUFFIXES:
        raise UserError(
            f"dataset {path} is of no kind that can be read",
            found="a folder without such files" if path.is_dir() else f"a file named {path.name}",
            expected=_EXPECTED,
            fix='convert it to JSON lines such as {"text": "one document"}',
        )
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "check the path and its permissions"
        raise UserError(f"{path} cannot be read", found=error.strerror or error, fix=fix) from None


def _lines(path: Path, limit: int, start: Position | None) -> Iterator[tuple[RawRow, Callable[[], Position]]]:
    with _reading(path), path.open("rb") as file:
        number = start["line"] if start is not None else 0
        file.seek(start["byte"] if start is not None else 0)
        while line := file.readline(limit + 1):
            number += 1
            length = len(line)
            while not line.endswith(b"\n") and (more := file.readline(limit)):  # the rest is counted and not kept
                length += len(more)
                line = more if more.endswith(b"\n") else line
            if length <= limit + 1 and not line.strip():
                continue
            after: Callable[[], Position] = partial(dict, line=number, byte=file.tell())
            too_long = length if length > limit + 1 else None
            row = RawRow(f"line {number} of {path}", b"" if too_long else line, is_json=True, too_long=too_long)
            yield row, after


def _whole(path: Path, limit: int, start: Position | None) -> Iterator[tuple[RawRow, Callable[[], Position]]]:
    if start is not None:
        return
    with _reading(path):
        size = os.path.getsize(path)
        row = RawRow(str(path), b"", too_long=size) if size > limit else RawRow(str(path), path.read_bytes())
    yield row, partial(dict, done=True)


def _table(
    open_rows: Callable[[], Any], label: str, start: Position | None
) -> Iterator[tuple[RawRow, Callable[[], Position]]]:
    """Rows of a `datasets.Dataset` (by their number) or `IterableDataset` (which keeps its own position)."""
    rows = open_rows()
    number = start["row"] if start is not None else 0
    if not hasattr(rows, "load_state_dict"):
        for at in range(number, len(rows)):
            yield RawRow(f"row {at + 1} of {label}", rows[at]), partial(dict, row=at + 1)
        return
    if start is not None:
        rows.load_state_dict(start["state"])
    try:
        for value in rows:
            number += 1
            yield RawRow(f"row {number} of {label}", value), partial(_place, rows, number)
    except Exception as error:  # of pyarrow, fsspec or the Hub client: each has its own
        raise UserError(
            f"{label} cannot be read after row {number}", found=_first_line(error), fix="check or download it again"
        ) from error


def _place(rows: Any, number: int) -> Position:
    return {"row": number, "state": rows.state_dict()}


def _load(*arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset` without its progress bars, which would stand amid a run's own."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, **options)
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _parquet(path: Path) -> Any:
    try:
        return _load("parquet", data_files=str(path), split="train", streaming=True)
    except Exception as error:
        found, fix = _first_line(error), "download or copy the file again"
        raise UserError(f"{path} cannot be read", found=found, expected="a Parquet file", fix=fix) from error


def _hub_reader(dataset: DatasetRecipe, name: str) -> Reader:
    revision = _commit(name, dataset.revision)

    def rows() -> Any:
        try:
            return _load(name, dataset.name, split=dataset.split, revision=revision, streaming=dataset.streaming)
        except Exception as error:
            raise UserError(
                f"dataset {name}: no file or folder here has that name, and it could not be fetched from the Hub",
                found=_first_line(error),
                expected=_EXPECTED,
                fix="check path, name, split and revision of the entry, and your connection",
            ) from error

    label = f"{name}, split {dataset.split}"
    return Reader([lambda start: _table(rows, label, start)], [name, dataset.name, dataset.split, revision])


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a branch stands for now, so that all of a run reads the same; as given where nobody can tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return revision


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}" if str(error).strip() else repr(error)
