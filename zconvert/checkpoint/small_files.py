"""A checkpoint's small files, read as what they are: a stranger's.

Whoever packed a folder can put a link, a pipe or a device under any name in it. A link may lead to another file of the
folder, or into the Hub's cache; else a conversion would copy, and an export publish, what is no part of the checkpoint.
Weight files may lie elsewhere, as people keep them on other disks: all that is done with one begins at its header.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from zconvert.errors import UserError

MOST_BYTES = 32 * 2**20
"""of a small file; the largest configurations have a hundredth of it"""
_MOST_LISTED = 128 * 2**20
_LISTS = ("tokenizer.json", "model.safetensors.index.json")
"""files that list every token or tensor"""


def read_small(path: Path) -> bytes:
    """The contents of a small file in a checkpoint's folder.

    Raises:
        OSError: it is not there, or cannot be read.
        UserError: it is no file, leads out of its folder, or is larger than such a file can be.
    """
    size, most = require_inside(path, path.parent), _MOST_LISTED if path.name in _LISTS else MOST_BYTES
    if size > most:
        raise UserError(
            f"{path} is larger than such a file can be",
            found=f"{size:,} bytes",
            expected=f"at most {most:,}",
            fix="download or copy the checkpoint again, from where you trust it",
        )
    return path.read_bytes()


def require_inside(path: Path, folder: Path) -> int:
    """The size of a file that is a checkpoint's own, wherever links lead.

    Raises:
        OSError: it is not there.
        UserError: it is no file, or leads out of the checkpoint's folder.
    """
    size = require_file(path)
    # A folder in between can be the link, so that a file is looked at whether it is one or not.
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)) and not _is_blob(real):
        raise UserError(
            f"{path} is a link that leads out of the checkpoint's folder",
            found=str(real),
            expected="a file in the folder itself, or one of the Hub's cache",
            fix=f"if it belongs to the checkpoint, put it there: cp --remove-destination '{real}' '{path}'",
        )
    return size


def require_file(path: Path) -> int:
    """The size of a file, where it is one: opening a pipe alone would wait forever.

    Raises:
        OSError: there is nothing.
        UserError: it is a folder, a pipe, a device or a socket.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise UserError(
            f"{path} is no file",
            found=kinds.get(stat.S_IFMT(status.st_mode), "a device"),
            expected="a file, as checkpoints have it",
            fix="download or copy the checkpoint again, from where you trust it",
        )
    return status.st_size


def _is_blob(real: Path) -> bool:
    """Whether a file is one of those that the Hub's cache links to: `models--ORG--NAME/blobs/HASH`."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
