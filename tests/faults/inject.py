"""Fails a command at one of the things that it does to files, and runs it in a process of its own.

Operations of Python on files below a folder are counted: opening for writing, writes, renames, new folders and links,
flushes, cuts, removals. At the n-th an error is raised, or a signal is sent, before it is done. What libraries in other
languages write (safetensors, torch's zip files) does not pass here: for that there are disks that are full (`disk.py`).
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zconvert.cli.main import main

REMOVALS = ("unlink", "rmdir")
FAILED = "failed"
FOREVER = (errno.ENOSPC, errno.EROFS)
"""a disk that is full or read-only stays so; one that cannot write a sector may write the next one"""


@dataclass
class Injector:
    """Counts, and fails."""

    root: Path
    """operations below this folder count"""
    at: int | None = None
    """number of the operation to fail, from 0; None: only count"""
    fault: int | signal.Signals = errno.ENOSPC
    """the error to raise, or the signal to send"""
    done: list[str] = field(default_factory=list)
    """the operations, by name and file"""

    def install(self) -> None:
        """Works in this process from now on."""
        for name in ("mkdir", "unlink", "rmdir", "truncate"):
            self._wrap(name, lambda path, *_: path)
        for name in ("rename", "replace", "link", "symlink"):
            self._wrap(name, lambda _, path, *__: path)
        for name in ("fsync", "write", "pwrite", "ftruncate"):
            self._wrap(name, lambda handle, *_: f"/proc/self/fd/{handle}")
        self._wrap("copy_file_range", lambda _, handle, *__: f"/proc/self/fd/{handle}")
        self._wrap("open", lambda path, flags, *_: path if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None)
        self._wrap_open()

    def _wrap(self, name: str, path_of: Callable[..., Any]) -> None:
        stock = getattr(os, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            path = path_of(*args)
            if path is not None:
                self._meet(name, path, named.get("dir_fd"))
            return stock(*args, **named)

        setattr(os, name, wrapped)

    def _wrap_open(self) -> None:
        stock, meet = io.open, self._meet

        class Raw(io.FileIO):
            def write(self, content: Any) -> int:
                meet("write", self.name)
                return super().write(content)

            def truncate(self, size: int | None = None) -> int:
                meet("truncate", self.name)
                return super().truncate(size)

        def wrapped(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, *rest: Any, **others: Any,
        ) -> Any:  # fmt: skip
            if not set(mode) & set("wax+") or not isinstance(file, (str, os.PathLike)) or not self._below(str(file)):
                return stock(file, mode, buffering, encoding, errors, newline, *rest, **others)
            meet("open", file)
            raw = Raw(file, "".join(c for c in mode if c not in "bt"))
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

        io.open = builtins.open = wrapped  # type: ignore[assignment]

    def _below(self, path: str) -> bool:
        return os.path.realpath(path).startswith(f"{self.root}{os.sep}") and not path.startswith("/dev/")

    def _meet(self, name: str, path: Any, folder: int | None = None) -> None:
        text = os.fsdecode(path)
        if folder is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        # Of a link the link is meant, not what it leads to.
        real = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        real = os.path.realpath(text) if text.startswith("/proc/self/fd/") else real
        if not real.startswith(f"{self.root}{os.sep}"):
            return
        if isinstance(self.fault, signal.Signals):
            if len(self.done) == self.at:
                self.done.append(FAILED)
                os.kill(os.getpid(), self.fault)
        else:
            if name in REMOVALS and self.fault != errno.EROFS:
                return
            due = self.at is not None and (
                len(self.done) >= self.at if self.fault in FOREVER else len(self.done) == self.at
            )
            if due:
                self.done.append(FAILED)
                names = () if text.startswith("/proc/self/fd/") else (text,)  # of an open file no name is told
                raise OSError(self.fault, os.strerror(self.fault), *names)
        self.done.append(f"{name} {real.removeprefix(str(self.root))}")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    """its exit code; minus the number of the signal that killed it"""
    stdout: str
    stderr: str
    operations: list[str]
    """that were counted, `FAILED` in the place of one that failed; none of a process that was killed"""

    @property
    def met(self) -> bool:
        """Whether the fault came."""
        return self.code == -signal.SIGKILL or FAILED in self.operations

    @property
    def words(self) -> str:
        """What it said on stderr, without line breaks."""
        return " ".join(self.stderr.split())


def run(
    arguments: list[str],
    injector: Injector | None = None,
    prepare: Callable[[], object] = lambda: None,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Runs `zconvert ARGUMENTS` in a fork of this process, which has imported everything already.

    Args:
        arguments: of the command line.
        injector: works in it.
        prepare: called in it first.
        environment: variables to set.
    """
    with tempfile.TemporaryDirectory(prefix="zconvert-command-") as work:
        said = [Path(work) / name for name in ("stdout", "stderr", "operations")]
        process = os.fork()
        if process == 0:
            _child(arguments, injector, prepare, environment or {}, said)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        stdout, stderr, operations = (path.read_text() if path.exists() else "" for path in said)
    return Outcome(code, stdout, stderr, operations.splitlines())


def _child(arguments: list[str], injector: Injector | None, prepare: Any, environment: Any, said: list[Path]) -> None:
    code = 1
    try:
        for number, path in enumerate(said[:2], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["zconvert", *arguments]
        os.environ.update({"COLUMNS": "400", **environment})
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
        prepare()
        if injector is not None:
            injector.install()
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if injector is not None:
            said[2].write_text("\n".join(injector.done))
        os._exit(code)
