"""Folders that appear whole or not at all, and files put into them without moving more bytes than needed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from io import FileIO
from pathlib import Path
from typing import Literal

from zconvert.checkpoint.lock import held
from zconvert.checkpoint.small_files import require_inside
from zconvert.errors import UserError

_FICLONE = 0x40049409  # ioctl of Linux: share the extents of another file until one of the two is written to
_FIXES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "your quota is used up: free some space, or choose a folder elsewhere",
    errno.EROFS: "the disk is read-only: choose a folder elsewhere",
    errno.EACCES: "check the permissions, or choose another folder",
    errno.EPERM: "check the permissions, or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "this file system cannot hold files of that size: choose a folder on another disk",
}
BASE_CARD = "BASE_MODEL_CARD.md"
"""under this name the base's README.md travels: its licence and lineage, beside a card that tells of the conversion"""
TUNING_FILE = "tuning.json"
"""what decoding leaves in a checkpoint's folder, and no part of it"""
_STAY = {
    TUNING_FILE,
    "README.md",
    "zconvert_config.yaml",
    "provenance.json",
    "trainer_state.json",
    "model.safetensors.index.json",
}
_STAY_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".tflite"),
    *(".tmp", ".lock", ".incomplete"),
}
ORIGINALS = "tidar/source"
"""in a gated checkpoint: the source's own of the files that the conversion patched"""
_FOLDERS = ("additional_chat_templates", ORIGINALS)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_CHUNK = 4 * 1024 * 1024
_BUFFER = 1024 * 1024

Placed = Literal["reflink", "link", "copy"]
"""how a file was put into a folder: sharing its bytes until one is edited, as another name of it, or by copying"""


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Makes a folder that appears under its name only when everything in it is written.

    The body gets a temporary folder beside `out`; it is flushed to disk and renamed at the end, or removed when the
    body fails or is interrupted. `out` is held meanwhile, and what a killed process left of it is removed.

    Args:
        out: the folder to make; it must not exist, and its missing parents are made.

    Yields:
        the temporary folder.

    Raises:
        UserError: `out` exists, is being made by another process, or cannot be written (no space, no permission, …).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as work:
    ...     with new_folder(Path(work) / "made") as folder:
    ...         _ = (folder / "a.txt").write_text("a")
    ...     print(os.listdir(work))
    ['made']
    """
    refuse_existing(out)
    made_parents: list[Path] = []
    temporary = out.parent / f".{out.name[:200]}.partial-{secrets.token_hex(4)}"
    try:
        made_parents = _make_parents(out.parent)
        with held(out) as alone:
            refuse_existing(out)  # another process may just have finished it
            if alone:
                _remove_leftovers(out)
            temporary.mkdir()
            yield temporary
            _flush(temporary)
            refuse_existing(out)  # rename would silently take the place of an empty folder that came meanwhile
            temporary.rename(out)
            flush(out.parent)
    except BaseException as error:
        # Measured before the removal: afterwards the disk is no longer full.
        refusal = _as_user_error(error, out, temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in reversed(made_parents):
            _remove_if_empty(parent)
        if refusal is not None:
            raise refusal from error
        raise


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Makes a folder where the system has such things, and removes it after the block.

    Raises:
        UserError: none can be made.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        fix = "free some space there, or set TMPDIR to a folder on another disk"
        raise UserError("no temporary folder can be made", found=error, fix=fix) from error
    with made as folder:
        yield Path(folder)


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Holds a folder that grows while a command writes to it, and makes it where it is missing.

    Raises:
        UserError: another process writes to it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        with writing(folder):
            if not folder.exists():
                stack.callback(_remove_if_empty, folder)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder))
        yield


@contextlib.contextmanager
def own_file(path: Path) -> Iterator[None]:
    """Holds a file that grows while a command writes to it; its folder is made where it is missing.

    Raises:
        UserError: another process writes to it, or nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(path))
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Tells of a write to `out` that fails as a `UserError`: what failed, the space that is left, and the fix."""
    try:
        yield
    except OSError as error:
        refusal = _as_user_error(error, out)
        assert refusal is not None
        raise refusal from error


def write_file(path: Path, content: str | bytes) -> None:
    """Puts a file at `path` that is there whole: what stood there stays until the new one is on disk.

    Args:
        path: of the file; missing folders are made.
        content: bytes, or text for UTF-8.

    Raises:
        UserError: it cannot be written; what stood there is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.unlink(missing_ok=True)  # of a killed process; or a link, through which nothing is to be written
            with partial.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def add_line(file: FileIO, line: str) -> None:
    """Adds a line to a file that grows; it is there when this returns.

    Args:
        file: opened for appending without a buffer, which would fail once more when it is closed.
        line: without its end.

    Raises:
        UserError: it cannot be written; a part of the line may be there.
    """
    rest = f"{line}\n".encode()
    with writing(Path(file.name)):
        while rest:  # the kernel may write a part of it, and say why only when asked for the rest
            rest = rest[file.write(rest) :]


def place(src: Path, dst: Path) -> Placed:
    """Puts an unchanged file at `dst`, the cheapest way that works: reflink, hard link, copy.

    Symbolic links are followed, so that a file of the Hub's cache is linked and not the link to it. A hard-linked file
    must never be edited in place: it is the source's file too.

    Returns:
        the way that worked.
    """
    real = Path(os.path.realpath(src))
    if _reflink(real, dst):
        return "reflink"
    try:
        os.link(real, dst)
        return "link"
    except FileExistsError:
        raise
    except OSError:  # another disk, no hard links on this one, or no permission to link others' files
        _copy_bytes(real, dst)
        return "copy"


def can_link(src: Path, folder: Path) -> bool:
    """Whether a hard link to `src` could stand in `folder`, as far as one can tell without making it: on one disk."""
    try:
        return os.stat(src).st_dev == os.stat(_existing(folder)).st_dev
    except OSError:
        return False


def copy(src: Path, dst: Path) -> Placed:
    """Puts an independent file at `dst`, one that may be edited: reflink, else a copy of the bytes.

    Returns:
        the way that worked.
    """
    real = Path(os.path.realpath(src))
    if _reflink(real, dst):
        return "reflink"
    _copy_bytes(real, dst)
    return "copy"


def link(src: Path, dst: Path) -> None:
    """Puts a symbolic link at `dst`, for a folder that is only read and soon goes again."""
    dst.symlink_to(os.path.realpath(src))


def copy_companions(src: Path, dst: Path, *, without: Collection[str] = ()) -> None:
    """Copies what belongs to a checkpoint beside its weights: tokenizer, chat templates, licence, its own code, and
    what a gated one keeps of its source.

    Copies and not links, since these are files that people edit. Weights (also of other formats, which would still hold
    the old values), train states, hidden files and the model card stay; a source's card goes along as `BASE_CARD`.

    Args:
        src: the source's folder.
        dst: the folder to copy to.
        without: names of further files to leave out, as they are written anew.
    """
    for name, path in companions(src).items():
        if name not in without:
            (dst / name).parent.mkdir(parents=True, exist_ok=True)
            copy(path, dst / name)


def companions(src: Path) -> dict[str, Path]:
    """What `copy_companions` copies: name in the new folder -> the file.

    Raises:
        UserError: such a file is a link that leads nowhere or out of the folder.
    """
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        if (src / folder).is_dir():
            found |= {f"{folder}/{inner.name}": inner for inner in sorted((src / folder).iterdir()) if inner.is_file()}
    for path in sorted(src.iterdir()):
        name = path.name
        if name.startswith(".") or path.suffix.lower() in _STAY_SUFFIXES or name in _STAY:
            continue
        if path.is_symlink() and not os.path.exists(path):  # also a loop, which Path.exists of Python 3.11 raises on
            raise UserError(
                f"{path} cannot be read",
                found=f"a link to {os.readlink(path)}, which leads to no file",
                expected="the file",
                fix="download or copy the checkpoint again, or remove the link if the file is not needed",
            )
        if path.is_file():
            found[name] = path
    if (src / "README.md").is_file() and BASE_CARD not in found:
        found[BASE_CARD] = src / "README.md"
    for path in found.values():
        require_inside(path, src)
    return found


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(out: Path) -> None:
    """Raises a `UserError` where something stands at `out`, be it a link that leads nowhere."""
    if os.path.lexists(out):
        kind = "a folder" if out.is_dir() else "a file"
        if out.is_dir() and not out.is_symlink():
            with contextlib.suppress(OSError):
                kind = "a folder with files in it" if any(out.iterdir()) else "an empty folder"
        raise UserError(
            f"{out} exists already",
            found=kind,
            expected="the name of a new folder; nothing is overwritten",
            fix="choose another name, or remove it",
        )


def _remove_leftovers(out: Path) -> None:
    """Removes what killed processes left of `out`; the caller holds it, so that nobody is at work there."""
    leftover = re.compile(re.escape(f".{out.name[:200]}.partial-") + "[0-9a-f]{8}")
    for path in out.parent.iterdir():
        if leftover.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _make_parents(folder: Path) -> list[Path]:
    """Makes a folder and its missing parents; returns those made, outermost first."""
    missing: list[Path] = []
    while not folder.exists():
        missing.insert(0, folder)
        folder = folder.parent
    for path in missing:
        path.mkdir(exist_ok=True)
    return missing


def _reflink(src: Path, dst: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not a Unix system
        return False
    with src.open("rb") as reader, dst.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            return True
        except OSError:  # the file system has no reflinks
            pass
    dst.unlink()
    return False


def _copy_bytes(src: Path, dst: Path) -> None:
    with src.open("rb") as reader, dst.open("xb") as writer:
        if hasattr(os, "copy_file_range"):  # in the kernel, without moving the bytes through this process
            with contextlib.suppress(OSError):  # another disk, or a file system that cannot do it
                while os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK):
                    pass
        # Goes on from there, mostly at the end: the kernel also stops early, on a full disk without saying so.
        shutil.copyfileobj(reader, writer, _BUFFER)


def _flush(folder: Path) -> None:
    """Has everything under a folder on disk before the rename makes it visible."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems flush no folders
            raise
    finally:
        os.close(handle)


def _as_user_error(error: BaseException, out: Path, begun: Path | None = None) -> UserError | None:
    """What a failed write means to the user, or None where it is no matter of files and disks."""
    if isinstance(error, OSError):
        number, message = error.errno, error.strerror or str(error)
        what = f"{error.filename} cannot be used" if error.filename else f"{out} cannot be written"
    elif type(error).__name__ == "SafetensorError" and (match := _OS_ERROR.search(str(error))):
        number = int(match[1])
        message, what = os.strerror(number), f"{out} cannot be written"
    else:
        return None
    if number in (errno.ENOSPC, errno.EDQUOT):
        what = f"{out} cannot be written: the disk is full"
    free = free_space(out)
    room = "unknown space" if free is None else f"{free / 1e9:.3g} GB"
    room += " free" if begun is None or not begun.exists() else f" free, {_size(begun) / 1e9:.3g} GB of it written"
    return UserError(what, found=f"{message} ({room})", fix=_FIXES.get(number or 0, "check the disk"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_space(out: Path) -> int | None:
    """Bytes free on the disk that `out` would be on; None where that cannot be told."""
    try:
        return shutil.disk_usage(_existing(out)).free
    except OSError:
        return None


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if os.path.exists(place)), Path(path.anchor))
