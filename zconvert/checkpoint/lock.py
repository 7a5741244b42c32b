"""One writer at a time: what a command writes is held by a lock that the kernel gives back when the process ends.

    OUT/.zconvert.lock     of a folder that is there: a run's, an evaluation's
    .OUT.lock              beside a file, or a folder that appears when it is whole

The file names its holder, and goes when the lock is given back. One that a killed process left behind holds nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from zconvert.errors import UserError

LOCK_FILE = ".zconvert.lock"
"""in a folder that is held; hidden, so that neither exports nor fingerprints see it"""


@contextlib.contextmanager
def held(out: Path) -> Iterator[bool]:
    """Keeps other processes from writing to `out`, until the block or this process ends.

    Args:
        out: a folder, or a file or folder to come, whose parent is there.

    Yields:
        whether it is held: on a file system without locks nobody is kept away.

    Raises:
        UserError: another process holds it.
        OSError: no file can be made there.
    """
    path = out / LOCK_FILE if out.is_dir() else out.with_name(f".{out.name[:200]}.lock")
    handle = _take(path, out)
    try:
        if handle is not None:
            _sign(handle)
        yield handle is not None
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held: see `_take`
            os.close(handle)


def _take(path: Path, out: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # not a Unix system
        return None
    while True:
        # For writing, which locks over NFS ask for; never through a link, whose target would be signed.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it may have removed the file between the two: then this lock is on a file that nobody finds.
            if _is(handle, path):
                return handle
            os.close(handle)
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise UserError(
                f"{out} is being written by another process",
                found=holder,
                expected="one process at a time",
                fix="wait until it has ended, or write somewhere else",
            ) from None
        except OSError:  # no locks here, or a disk with no room for a name
            os.close(handle)
            with contextlib.suppress(OSError):
                path.unlink()
            return None


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    signature = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(signature).encode(), 0)


def _holder(handle: int) -> str:
    try:
        signature = json.loads(os.pread(handle, 4096, 0))
        return f"process {signature['pid']} on {signature['host']}, since {signature['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "a process that did not write down its name"
