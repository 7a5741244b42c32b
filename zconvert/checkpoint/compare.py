"""Files are compared byte by byte: a file with its finished copy, or with one that is still being made."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 1024 * 1024  # two of them fit into the processor's cache: four times faster than with 16 MiB
_THREADS = 2
_STRIDE = 64 * _CHUNK

Span = tuple[int, int, int]
"""bytes that must be equal: where they begin in the one file, where in the other, and how many"""
Range = tuple[int, int]
"""bytes of a file: the first, and the first one beyond"""


def around(ranges: Sequence[Range], end: int, start: int = 0) -> list[Span]:
    """What a file has from `start` to `end` besides these ranges, which are sorted.

    >>> around([(2, 4), (7, 9)], 10)
    [(0, 0, 2), (4, 4, 3), (9, 9, 1)]
    """
    edges = [start, *(min(max(edge, start), end) for pair in ranges for edge in pair), end]
    return [(a, a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def first_difference(src: Path, dst: Path, spans: Iterable[Span], threads: int = _THREADS) -> int | None:
    """Where two files differ: an offset in `dst`, the first that was come upon, or None where all is equal."""
    chunks, lock, found = _chunks(spans), threading.Lock(), list[int]()
    failures: list[OSError] = []

    def work() -> None:
        ours, theirs = bytearray(_CHUNK), bytearray(_CHUNK)
        try:
            with src.open("rb", buffering=0) as one, dst.open("rb", buffering=0) as other:
                while not found and not failures:
                    with lock:
                        a, b, count = next(chunks, (0, 0, 0))
                    if count == 0:
                        return
                    short = _fill(one, a, ours, count) != count or _fill(other, b, theirs, count) != count
                    if short or (ours != theirs if count == _CHUNK else ours[:count] != theirs[:count]):
                        found.append(b + next((i for i in range(count) if ours[i] != theirs[i]), 0))
        except OSError as error:
            failures.append(error)

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    return min(found, default=None)


class Trail:
    """Compares a file with its copy while the copy is being made, some way behind, in a thread of its own.

    Args:
        src: the file.
        dst: its copy.
        skip: ranges to leave out, sorted: those that are to be edited afterwards.
    """

    def __init__(self, src: Path, dst: Path, skip: Sequence[Range]) -> None:
        self._files, self._skip = (src, dst), skip
        self._reached: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._end = 0
        self._difference: int | None = None
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def reached(self, copied: int) -> None:
        """Tells that so many bytes, from the start of the file, are copied."""
        self._reached.put(copied)

    def finish(self) -> tuple[int, int | None]:
        """Waits for the end of the comparison.

        Returns:
            up to where the files were compared (without the ranges left out), and where they differ, if they do.
        """
        self.stop()
        if self._failure is not None:
            raise self._failure
        return self._end, self._difference

    def stop(self) -> None:
        """Ends the thread, after what it was told of so far; may be called again."""
        self._reached.put(None)
        self._thread.join()

    def _follow(self) -> None:
        copied, more = 0, True
        while more and self._difference is None:
            told = self._reached.get()
            with contextlib.suppress(queue.Empty):
                while told is not None:
                    copied = told
                    told = self._reached.get_nowait()
            more = told is not None
            if copied - self._end >= _STRIDE or not more:
                try:
                    spans = around(self._skip, copied, self._end)
                    self._difference = first_difference(*self._files, spans, threads=1)
                except OSError as error:
                    self._failure = error
                    return
                self._end = copied


def _chunks(spans: Iterable[Span]) -> Iterator[Span]:
    for a, b, count in spans:
        for start in range(0, count, _CHUNK):
            yield a + start, b + start, min(_CHUNK, count - start)


def _fill(file: Any, offset: int, buffer: bytearray, count: int) -> int:
    file.seek(offset)
    view, got = memoryview(buffer)[:count], 0
    while got < count and (more := file.readinto(view[got:])):
        got += more
    return got
