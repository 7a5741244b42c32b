"""What zconvert keeps beside a stranger's files is read with care, and written to no place that a link leads to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zconvert.checkpoint.folder import TUNING_FILE, own_folder, write_file
from zconvert.checkpoint.lock import LOCK_FILE
from zconvert.errors import UserError
from zconvert.serving.hindsight import Scored
from zconvert.serving.timing import Known, Times, _read

pytestmark = pytest.mark.timeout(60)  # a pipe would be read forever
KEPT = "not to be touched"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    (tmp_path / "private.txt").write_text(KEPT)
    return tmp_path / "private.txt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stranger").mkdir()
    return tmp_path / "stranger"


@pytest.mark.parametrize("name", ["told.json", ".told.json.partial"])
def test_a_file_takes_a_links_place_and_its_target_stays(folder: Path, kept: Path, name: str) -> None:
    (folder / name).symlink_to(kept)
    write_file(folder / "told.json", "{}")
    assert (folder / "told.json").read_text() == "{}"
    assert not (folder / "told.json").is_symlink()
    assert kept.read_text() == KEPT


def test_what_a_killed_process_left_is_written_over(folder: Path) -> None:
    (folder / ".told.json.partial").write_text("half")
    write_file(folder / "told.json", "{}")
    assert os.listdir(folder) == ["told.json"]


@pytest.mark.parametrize("name", [TUNING_FILE, f".{TUNING_FILE}.partial"])
def test_tuning_is_not_written_through_a_link(folder: Path, kept: Path, name: str) -> None:
    (folder / name).symlink_to(kept)
    Known(Times("here", {1: {1: 0.5}}), file=folder / TUNING_FILE).save()
    assert kept.read_text() == KEPT
    assert _read(folder / TUNING_FILE)["forwards"] == {"here": {1: {1: 0.5}}}


def test_a_lock_signs_no_file_that_a_link_leads_to(folder: Path, kept: Path) -> None:
    (folder / LOCK_FILE).symlink_to(kept)
    with pytest.raises(UserError, match="cannot be used"), own_folder(folder):
        pass
    assert kept.read_text() == KEPT


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_large_one(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("make", [a_pipe, a_device, a_large_one])
def test_a_tuning_file_that_is_none_is_as_if_it_were_missing(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / TUNING_FILE)
    assert _read(folder / TUNING_FILE) == _read(None)


@pytest.mark.parametrize(
    "forwards",
    [
        *({"here": {"1": {"1": seconds}}} for seconds in (0, -1, math.nan, math.inf, "a", None, [])),
        *({"here": table} for table in ({"0": {"1": 1}}, {"1": {}}, {"a": {"1": 1}}, {"1": 1}, [], None)),
        *(None, [], 7, {"here": {"1" * 5000: {"1": 1}}}),
    ],
)
def test_times_that_no_forward_takes_are_measured_anew(folder: Path, forwards: Any) -> None:
    (folder / TUNING_FILE).write_text(json.dumps({"forwards": forwards, "block_size": 4, "texts": []}))
    assert _read(folder / TUNING_FILE)["forwards"] == {}


@pytest.mark.parametrize("text", ["[" * 200_000, '{"block_size": 1e999, "forwards": {}, "texts": []}', "", "7", "\0"])
def test_what_is_no_tuning_file_is_as_if_it_were_missing(folder: Path, text: str) -> None:
    (folder / TUNING_FILE).write_text(text)
    assert _read(folder / TUNING_FILE) == _read(None)


def test_a_forward_takes_time_whatever_a_file_says_of_others() -> None:
    falling = Times("here", {1: {1: 1.0, 2: 0.5}, 2: {1: 0.1, 2: 0.1}})
    assert falling.of(1, 100) > 0
    assert falling.of(100, 1) > 0


def test_a_good_tuning_file_is_read(folder: Path) -> None:
    known = Known(Times("here", {2: {1: 0.5, 5: 0.75}}), [Scored([[1, 0], [0, 0], [0, 0]])], folder / TUNING_FILE)
    known.save()
    told = _read(folder / TUNING_FILE)
    assert (told["forwards"], told["block_size"]) == ({"here": {2: {1: 0.5, 5: 0.75}}}, 2)
    assert told["texts"] == [[[1, 0], [0, 0], [0, 0]]]
