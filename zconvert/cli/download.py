"""The progress of a download on stderr: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from zconvert.checkpoint.hub import Progress as Report
from zconvert.cli.ui import err

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown(name: str) -> Iterator[Report]:
    """Shows a download while the block runs; nothing is shown where nothing needs to be fetched.

    Args:
        name: what is fetched.

    Yields:
        the callback for `resolve`. No other live display may be on at the same time.
    """
    if err.is_terminal:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("Fetching {task.description}", markup=False), *columns, console=err) as bars:
            task = bars.add_task(name, total=None, visible=False)
            yield lambda done, total: bars.update(task, completed=done, total=total, visible=total > 0)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and total:
            last = now
            err.print(f"Fetching {name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", soft_wrap=True)

    yield line
