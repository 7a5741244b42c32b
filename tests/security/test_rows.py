"""Rows of strangers' tasks and answers to them: what is packed is bounded and never unpickled, what is judged small."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.rows import packed
from tests.security.commands import refused
from zconvert.evaluation import tasks
from zconvert.evaluation.answers import extract, is_right
from zconvert.recipe.task import AnswerSection, CheckSection


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


def test_a_pickle_of_millions_of_operations_is_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    real = tasks.pickletools.genops

    def counted(data: bytes) -> Iterator[Any]:
        nonlocal seen
        for operation in real(data):
            seen += 1
            yield operation

    monkeypatch.setattr(tasks.pickletools, "genops", counted)
    pickled = pickle.dumps("[]", 4)
    for data in (b"\x94" * 100_000, pickled[:-1] + b"\x94" * 100_000 + b"."):
        assert tasks._packed(base64.b64encode(zlib.compress(data)).decode()) is None
    assert seen <= 2 * tasks._MOST_OPERATIONS


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", ["1e999999999", "-1E+999999999", "1e-999999999", "$9e99999999%"])
def test_a_number_whose_digits_would_fill_the_memory_is_none(answer: str) -> None:
    check = CheckSection(method="numeric", target="{answer}")
    assert not is_right(answer, "3", check)
    assert not is_right("3", answer, check)
    assert is_right("1.5e300", "15e299", check)


@pytest.mark.timeout(60)
def test_an_answer_that_opens_boxes_without_end_is_read_once() -> None:
    section = AnswerSection(take="boxed")
    assert extract("\\boxed{" * 100_000, section) is None
    assert extract("\\boxed{" * 100_000 + "7}", section) == "7"


@pytest.mark.parametrize("row", ["[" * 100_000, '{"id": ' + "9" * 5000 + "}", "7", "\xff", "{"])
def test_a_row_that_is_no_row_is_told_by_its_line(tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(row.encode("latin-1") + b"\n")
    assert "line 1 of" in refused("tasks", "check", f"gsm8k={tmp_path / 'rows.jsonl'}")
