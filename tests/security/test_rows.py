"""Rows of strangers' tasks: what is packed in them is bounded, and is never unpickled."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.rows import packed
from tests.security.commands import refused
from zconvert.evaluation import tasks


def cases(value: str) -> list[tuple[str, str]]:
    return tasks._cases({"private": value}, "private", "the row")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("text", ["a", "é" * 300, "x" * 70_000])
def test_a_packed_text_is_read_whatever_pickled_it(protocol: int, text: str) -> None:
    listed = json.dumps([{"input": text, "output": "b"}])
    value = base64.b64encode(zlib.compress(pickle.dumps(listed, protocol))).decode()
    assert cases(value) == [(text, "b")]


def test_what_unpacks_to_too_much_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_MOST_UNPACKED", 10_000)
    assert cases(packed("[" + " " * 9_000 + "]")) == []
    monkeypatch.setattr(zlib, "decompress", None)  # which knows no bound
    assert tasks._packed(packed("[" + " " * 20_000 + "]")) is None


@pytest.mark.parametrize("value", [7, [1], {"a": "[]"}, ("[]",), b"[]", None, 1.5, ["[]", "[]"]])
def test_what_is_no_text_is_not_unpickled(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    row = packed(value)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    assert tasks._packed(row) is None


@pytest.mark.parametrize("row", ["[" * 100_000, '{"id": ' + "9" * 5000 + "}", "7", "\xff", "{"])
def test_a_row_that_is_no_row_is_told_by_its_line(tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(row.encode("latin-1") + b"\n")
    assert "line 1 of" in refused("tasks", "check", f"gsm8k={tmp_path / 'rows.jsonl'}")
