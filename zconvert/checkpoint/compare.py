"""Files are compared byte by byte, in pieces."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 1024 * 1024  # two of them fit into the processor's cache: four times faster than with 16 MiB
_THREADS = 2

Span = tuple[int, int, int]
"""bytes that must be equal: where they begin in the one file, where in the other, and how many"""
Range = tuple[int, int]
"""bytes of a file: the first, and the first one beyond"""


def around(ranges: Sequence[Range], size: int) -> list[Span]:
    """What a file of a size has besides these ranges, which are sorted.

    >>> around([(2, 4), (7, 9)], 10)
    [(0, 0, 2), (4, 4, 3), (9, 9, 1)]
    """
    edges = [0, *(edge for pair in ranges for edge in pair), size]
    return [(a, a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def first_difference(src: Path, dst: Path, spans: Iterable[Span]) -> int | None:
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

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(_THREADS - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    return min(found, default=None)


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
