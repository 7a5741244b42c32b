"""A download's progress goes to stderr: a bar in a terminal, lines in a file, nothing where nothing is fetched."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from zconvert.cli import download


def shown(monkeypatch: pytest.MonkeyPatch, counts: list[tuple[int, int]], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, markup=False)  # as ui.err
    monkeypatch.setattr(download, "err", console)
    monkeypatch.setattr(download, "SECONDS_BETWEEN_LINES", 0.0)
    with download.shown("org/[red]name") as report:
        for count in counts:
            report(*count)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_sees_a_bar_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, [(5_000_000, 10_000_000), (10_000_000, 10_000_000)], terminal=True)
    assert "Fetching org/[red]name" in text
    assert "10.0/10.0 MB" in text


def test_a_file_gets_lines_and_a_quick_download_none(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [(5_000_000, 10_000_000), (10_000_000, 10_000_000)]
    lines = shown(monkeypatch, counts, terminal=False).splitlines()
    assert lines == ["Fetching org/[red]name: 5 of 10 MB", "Fetching org/[red]name: 10 of 10 MB"]
    assert shown(monkeypatch, [], terminal=False) == ""
