"""Folders that appear whole or not at all, and files put into them without moving more bytes than needed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

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
_STAY = {"README.md", "zconvert_config.yaml", "provenance.json", "trainer_state.json", "model.safetensors.index.json"}
_STAY_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".tflite"),
    *(".tmp", ".lock", ".incomplete"),
}
_FOLDERS = ("additional_chat_templates",)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Makes a folder that appears under its name only when everything in it is written.

    The body gets a temporary folder beside `out`; it is flushed to disk and renamed at the end, or removed when the
    body fails or is interrupted.

    Args:
        out: the folder to make; it must not exist, and its missing parents are made.

    Yields:
        the temporary folder.

    Raises:
        UserError: `out` exists, or cannot be written (no space, no permission, ...).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as work:
    ...     with new_folder(Path(work) / "made") as folder:
    ...         _ = (folder / "a.txt").write_text("a")
    ...     print(os.listdir(work))
    ['made']
    """
    _refuse_existing(out)
    made_parents: list[Path] = []
    temporary: Path | None = None
    try:
        made_parents = _make_parents(out.parent)
        temporary = out.parent / f".{out.name[:200]}.partial-{secrets.token_hex(4)}"
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        _refuse_existing(out)  # rename would silently take the place of an empty folder that came meanwhile
        temporary.rename(out)
        _flush_one(out.parent)
    except BaseException as error:
        # Measured before the removal: afterwards the disk is no longer full.
        refusal = _as_user_error(error, out)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in reversed(made_parents):
            with contextlib.suppress(OSError):  # something else is in it by now
                parent.rmdir()
        if refusal is not None:
            raise refusal from error
        raise


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Tells of a write to `out` that fails as a `UserError`: what failed, the space that is left, and the fix."""
    try:
        yield
    except OSError as error:
        refusal = _as_user_error(error, out)
        assert refusal is not None
        raise refusal from error


def place(src: Path, dst: Path) -> None:
    """Puts an unchanged file at `dst`, the cheapest way that works: reflink, hard link, copy.

    Symbolic links are followed, so that a file of the Hub's cache is linked and not the link to it. A hard-linked file
    must never be edited in place: it is the source's file too.
    """
    real = Path(os.path.realpath(src))
    if _reflink(real, dst):
        return
    try:
        os.link(real, dst)
    except FileExistsError:
        raise
    except OSError:  # another disk, no hard links on this one, or no permission to link others' files
        _copy_bytes(real, dst)


def copy(src: Path, dst: Path) -> None:
    """Puts an independent file at `dst`, one that may be edited: reflink, else a copy of the bytes."""
    real = Path(os.path.realpath(src))
    if not _reflink(real, dst):
        _copy_bytes(real, dst)


def copy_companions(src: Path, dst: Path, *, without: Collection[str] = ()) -> None:
    """Copies what belongs to a checkpoint beside its weights: tokenizer, chat templates, licence, its own code.

    Copies and not links, since these are files that people edit. Weights (also of other formats, which would still hold
    the old values), train states, hidden files and the model card stay; a source's card goes along as `BASE_CARD`.

    Args:
        src: the source's folder.
        dst: the folder to copy to.
        without: names of further files to leave out, as they are written anew.
    """
    for path in sorted(src.iterdir()):
        name = path.name
        if name in _FOLDERS and path.is_dir():
            (dst / name).mkdir()
            for inner in sorted(path.iterdir()):
                if inner.is_file():
                    copy(inner, dst / name / inner.name)
        wanted = not name.startswith(".") and path.suffix.lower() not in _STAY_SUFFIXES and name not in _STAY
        if wanted and name not in without and path.is_file():
            copy(path, dst / name)
    if (src / "README.md").is_file() and not (src / BASE_CARD).exists():
        copy(src / "README.md", dst / BASE_CARD)


def _refuse_existing(out: Path) -> None:
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
        shutil.copyfileobj(reader, writer, 16 * 1024 * 1024)


def _flush(folder: Path) -> None:
    """Has everything under a folder on disk before the rename makes it visible."""
    for path in sorted(folder.rglob("*")):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems flush no folders
            raise
    finally:
        os.close(handle)


def _as_user_error(error: BaseException, out: Path) -> UserError | None:
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
    return UserError(what, found=f"{message} ({_free(out)} free)", fix=_FIXES.get(number or 0, "check the disk"))


def _free(out: Path) -> str:
    for parent in out.absolute().parents:
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(parent).free / 1e9:.3g} GB"
    return "unknown space"
