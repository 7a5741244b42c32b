"""Fetching a checkpoint from the Hub: small files always, weights whole or by their headers alone."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from zconvert.checkpoint.headers import INDEX_FILE, SINGLE_FILE, Headers, read_headers
from zconvert.errors import UserError

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*", "README.md"]
_WEIGHTS = ["*.safetensors"]
# Other formats and copies of the weights; additional_chat_templates/*.jinja is the one sub-folder that is wanted.
_IGNORED = ["*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "consolidated*", "*.bin", "*.pt", "*.pth"]

Progress = Callable[[int, int], None]
"""called with the bytes fetched and the bytes to fetch, as far as these are known yet"""


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    weights: bool = True,
    on_progress: Progress | None = None,
) -> tuple[Path, str]:
    """Fetches a checkpoint into the Hub's cache, or finds it there.

    Args:
        name: Hub id, `org/name`.
        revision: branch, tag or commit; `main` where None.
        token: access token; the one that `hf auth login` stored where None.
        weights: False leaves the weight files out; `fetch_headers` then tells what is in them.
        on_progress: told about the download.

    Returns:
        the folder of the snapshot, and its commit.

    Raises:
        UserError: it is not there, access is refused, the Hub cannot be reached, or the disk is full.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(name, revision):
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                allow_patterns=SMALL_FILES + (_WEIGHTS if weights else []),
                ignore_patterns=_IGNORED,
                tqdm_class=_reporter(on_progress),
            )
        )
    return folder, folder.name


def fetch_headers(folder: Path, name: str, commit: str, token: str | None = None) -> Headers | None:
    """Reads the headers of the weight files on the Hub by ranged requests.

    Args:
        folder: the snapshot that `fetch` made, with the index where there are several shards.
        name: Hub id.
        commit: the snapshot's commit.
        token: as for `fetch`.

    Returns:
        the headers, or None where the weights are in the folder already.

    Raises:
        UserError: as `fetch` and `read_headers`.
    """
    if _has_weights(folder):
        return None
    with _hub_errors(name, commit):
        return read_headers(folder, _HubFiles(name, commit, token))


def _has_weights(folder: Path) -> bool:
    """Whether all weights were fetched before."""
    if (folder / SINGLE_FILE).exists():
        return True
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        return all((folder / shard).exists() for shard in set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class _HubFiles:
    """Shards on the Hub, of which only the requested ranges travel."""

    _BLOCK = 1 << 17  # most headers fit into one block

    def __init__(self, name: str, commit: str, token: str | None) -> None:
        from huggingface_hub import HfFileSystem

        self._system = HfFileSystem(token=token)
        self._root = f"{name}@{commit}"

    def names(self) -> set[str]:
        return {str(path).rsplit("/", 1)[-1] for path in self._system.ls(self._root, detail=False)}

    def size(self, name: str) -> int:
        return int(self._system.info(f"{self._root}/{name}")["size"])

    def open(self, name: str) -> BinaryIO:
        return self._system.open(f"{self._root}/{name}", "rb", block_size=self._BLOCK)


def _reporter(on_progress: Progress | None) -> type:
    """A progress bar class for the Hub client that prints nothing and reports to `on_progress`."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Nowhere:
        def write(self, _text: str) -> None:
            pass

        def flush(self) -> None:
            pass

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # a word of the Hub client's own class
            kwargs.pop("disable", None)
            # One bar counts files and, in newer clients, a second one counts bytes sent before they are unpacked.
            self.reports = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            super().__init__(*args, **{**kwargs, "file": Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
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
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:
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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"{name} could not be stored",
            found=error.strerror,
            fix="free some space, or set HF_HOME to a folder on a larger disk",
        ) from error
