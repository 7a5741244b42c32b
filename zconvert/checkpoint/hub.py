"""Fetching a checkpoint from the Hub: small files always, weights whole or by their headers alone."""

from __future__ import annotations

import errno
import glob
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.headers import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE, ShardFiles, read_weight_map
from zconvert.errors import UserError
from zconvert.tidar.settings import OWN_FILES

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*", "README.md"]
# Copies for other programs are in sub-folders; what is wanted are additional_chat_templates/*.jinja and tidar/source.
# Patterns know no exceptions: the name of another folder differs from "tidar/" in the first letter, or the second, …
_OTHER_FOLDERS = [f"{'tidar/'[:place]}[!{letter}]*/" for place, letter in enumerate("tidar/")]
_IGNORED = [folder + files for folder in _OTHER_FOLDERS for files in ("*.json", "*.txt", "*.model", "*.tiktoken")]

TRANSIENT = (408, 429, 500, 502, 503, 504)
"""answers of the Hub after which it is asked again"""
_WAITS = (1.0, 4.0)
"""seconds before that, beside what its client does by itself"""
_SHA256 = re.compile("[0-9a-f]{64}")
_ENTRY_BYTES, _FRAME_BYTES = 96, 200
"""of a tensor in a shard's header beside its name, and of the rest, rather too many: one request then has it whole.
`"":{"dtype":"F8_E4M3","shape":[128,2880,5760],"data_offsets":[49999999999,49999999999]},` is 88 bytes"""

Progress = Callable[[int, int], None]
"""called with the bytes fetched and the bytes to fetch, as far as these are known yet"""


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    shards: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> tuple[Path, str]:
    """Fetches a checkpoint into the Hub's cache, or finds it there.

    A connection that breaks is taken up again where it broke; a later call fetches the files that are not whole yet.
    Weights that arrived are hashed, and fetched anew where they are not what the Hub has.

    Args:
        name: Hub id, `org/name`.
        revision: branch, tag or commit; `main` where None.
        token: access token; the one that `hf auth login` stored where None.
        shards: weight files to fetch beside the small files; `hub_files` reads headers without fetching any.
        on_progress: told about the download.

    Returns:
        the folder of the snapshot, and its commit.

    Raises:
        UserError: it is not there, access is refused, the Hub cannot be reached, what it sends is damaged, or the disk
            is full.
    """
    from huggingface_hub import errors, snapshot_download

    reporter, in_vain = _reporter(on_progress), 0
    files = [*shards, *OWN_FILES] if shards else []
    known = _stored(name)
    with _hub_errors(name, revision):
        while True:
            before = reporter.received
            try:
                folder = snapshot_download(
                    name,
                    revision=revision,
                    token=token,
                    allow_patterns=[
                        *SMALL_FILES,
                        *map(glob.escape, files),
                    ],
                    ignore_patterns=_IGNORED,
                    tqdm_class=reporter,
                )
                damaged = _drop_damaged(Path(folder), files, known)
                if not damaged:
                    return Path(folder), Path(folder).name
                in_vain += 1
                if in_vain > len(_WAITS):
                    raise UserError(
                        f"{name}: {damaged[0]} arrives damaged",
                        found=f"{in_vain} times other bytes than the sha256 that the Hub tells",
                        fix="try again from another network; nothing of it was kept",
                    )
            except errors.HTTPError as error:
                # The client goes on by itself after a connection was closed, not after a reset. Most answers of the
                # Hub are no break, and neither is a connection that never came to be.
                in_vain = 0 if reporter.received > before else in_vain + 1
                status = getattr(getattr(error, "response", None), "status_code", None)
                final = type(error).__name__ == "ConnectError" or (status is not None and status not in TRANSIENT)
                if final or in_vain > len(_WAITS):
                    raise
                if status is not None:
                    time.sleep(_WAITS[max(0, in_vain - 1)])


def _stored(name: str) -> set[str]:
    """Contents of a repository that are in the Hub's cache, by their hashes."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "blobs"
    return {path.name for path in blobs.iterdir()} if blobs.is_dir() else set()


def _drop_damaged(folder: Path, files: Sequence[str], known: set[str]) -> list[str]:
    """Removes files that arrived and are not what their hash says, and names them: the client looks at sizes alone.

    Args:
        folder: the snapshot, of links to contents that are named by their hash.
        files: that may be in it.
        known: contents that were there before, and those that are found to be right.
    """
    damaged = []
    for name in files:
        blob = Path(os.path.realpath(folder / name))
        if not _SHA256.fullmatch(blob.name) or blob.name in known or not blob.is_file():
            continue
        if sha256(blob) == blob.name:
            known.add(blob.name)
            continue
        blob.unlink()
        (folder / name).unlink(missing_ok=True)
        damaged.append(name)
    return damaged


def hub_files(folder: Path, name: str, commit: str, token: str | None = None) -> ShardFiles | None:
    """The weight files on the Hub, of which only the ranges that are read travel.

    Args:
        folder: the snapshot that `fetch` made, with the index where there are several shards.
        name: Hub id.
        commit: the snapshot's commit.
        token: as for `fetch`.

    Returns:
        the files, or None where the weights are in the folder already. Their methods raise as `fetch` does.
    """
    shards = _shards(folder)
    if shards and all((folder / shard).exists() for shard in shards):
        return None
    return _HubFiles(name, commit, token, shards)


def _shards(folder: Path) -> dict[str, int]:
    """The weight files of a snapshot by its index, with about the length of their headers; 0: nothing tells it.

    The single file where it is there or there is no index.
    """
    if (folder / SINGLE_FILE).exists():
        return {SINGLE_FILE: 0}
    if not (folder / INDEX_FILE).exists():
        return {SINGLE_FILE: 0}
    try:
        weight_map = read_weight_map(folder / INDEX_FILE)
    except UserError:
        return {}  # who reads the headers says what is wrong with the index
    lengths: Counter[str] = Counter()
    for tensor, shard in weight_map.items():
        lengths[shard] += len(tensor) + _ENTRY_BYTES
    return {shard: length + _FRAME_BYTES for shard, length in lengths.items()}


class _HubFiles:
    """Shards on the Hub, of which only the requested ranges travel."""

    _UNTOLD = 1 << 17
    """bytes asked for first where nothing tells how long a header is"""
    _MOST = 1 << 20
    _AT_ONCE = 32

    def __init__(self, name: str, commit: str, token: str | None, shards: Mapping[str, int]) -> None:
        from huggingface_hub import HfFileSystem

        self._name, self._commit, self._shards = name, commit, shards
        self._system = HfFileSystem(token=token)
        self._root = f"{name}@{commit}"
        self._starts: dict[str, bytes] | None = None

    def names(self) -> set[str]:
        with _hub_errors(self._name, self._commit):
            return {str(path).rsplit("/", 1)[-1] for path in self._system.ls(self._root, detail=False)}

    def size(self, name: str) -> int:
        with _hub_errors(self._name, self._commit):
            return int(self._system.info(f"{self._root}/{name}")["size"])

    def open(self, name: str) -> BinaryIO:
        if self._starts is None:
            self._starts = self._fetch_starts()
        start = self._starts.get(name, b"")
        return cast(BinaryIO, _Started(start, lambda first, end: self._range(name, first, end)))

    def _fetch_starts(self) -> dict[str, bytes]:
        """The headers of all shards, several at once: one after the other they take seconds."""
        present = self.names()
        wanted = [SINGLE_FILE] if SINGLE_FILE in present else [shard for shard in self._shards if shard in present]

        def header(name: str) -> bytes:
            share = min(self._MOST, self._shards.get(name) or self._UNTOLD)
            start = self._range(name, 0, share)
            length = 8 + int.from_bytes(start[:8], "little")
            # One that is too long to be true is refused by who reads it.
            return start + self._range(name, share, length) if share < length <= MAX_HEADER_BYTES else start

        with ThreadPoolExecutor(self._AT_ONCE) as pool:
            return dict(zip(wanted, pool.map(header, wanted), strict=True))

    def _range(self, name: str, first: int, end: int) -> bytes:
        end = min(end, self.size(name))
        if first >= end:
            return b""
        with _hub_errors(self._name, self._commit):
            return self._system.cat_file(f"{self._root}/{name}", start=first, end=end, cache_type="none")


class _Started:
    """A file of which the beginning is here, to be read from there on."""

    def __init__(self, start: bytes, fetch: Callable[[int, int], bytes]) -> None:
        self._start, self._fetch, self._position = start, fetch, 0

    def read(self, size: int) -> bytes:
        first, end = self._position, self._position + size
        here = self._start[first:end]
        if len(here) < size:
            here += self._fetch(first + len(here), end)
        self._position += len(here)
        return here

    def __enter__(self) -> _Started:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _reporter(on_progress: Progress | None) -> Any:
    """A progress bar class for the Hub client that prints nothing and reports to `on_progress`."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Nowhere:
        def write(self, _text: str) -> None:
            pass

        def flush(self) -> None:
            pass

    class Reporter(tqdm):
        received = 0
        """bytes that came in, over all bars"""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # a word of the Hub client's own class
            kwargs.pop("disable", None)
            # One bar counts files and, in newer clients, a second one counts bytes sent before they are unpacked.
            self.reports = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            super().__init__(*args, **{**kwargs, "file": Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.reports:
                Reporter.received += int(n or 0)
            if self.reports and on_progress is not None:
                on_progress(int(self.n), int(self.total or 0))
            return shown

    return Reporter


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the Hub client raises into a `UserError` that says what to do."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or pass --token"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated on the Hub",
            found="no access with this token, or without one",
            fix=f"ask for access at https://huggingface.co/{name}, then {login}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: neither a folder here nor a repository on the Hub",
            found="no such repository, or a private one that this token cannot see",
            fix=f"check the spelling; if it is private, {login}",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no revision {revision!r} on the Hub",
            expected="a branch, a tag or a commit",
            fix=f"look at https://huggingface.co/{name}/commits/main",
        ) from error
    except (errors.HFValidationError, errors.LocalTokenNotFoundError) as error:
        raise UserError(
            f"{name} cannot be looked up on the Hub", found=error, fix="check the name and token"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"{name}: the Hub refuses access", found=f"HTTP {status}", fix=login) from error
        raise UserError(
            f"{name}: no folder here has that name, and it could not be fetched from the Hub",
            found=" ".join(str(error.__cause__ or error).split())[:200],
            fix="check the path if you meant a folder; else the network (or HF_HUB_OFFLINE) and try again: "
            "what was fetched already is kept",
        ) from error
    except OSError as error:
        if str(error).startswith("Consistency check failed"):
            raise UserError(
                f"{name}: the Hub sends a file of another size than it tells",
                found=str(error).split(".\n")[0].removeprefix("Consistency check failed: "),
                fix="try again later, or from another network: what was fetched whole is kept",
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"{name} could not be stored",
            found=error.strerror,
            fix="free some space, or set HF_HOME to a folder on a larger disk",
        ) from error
