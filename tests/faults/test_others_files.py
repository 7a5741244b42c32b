"""What a kill cut short is gone on with, wherever the cut is; what is somebody else's is refused, and stays."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.checkpoint.disk import small_disk
from tests.faults.commands import Base
from zconvert.checkpoint.folder import TUNING_FILE, companions, write_file
from zconvert.errors import UserError
from zconvert.evaluation.samples import append, open_to_append, read_lines
from zconvert.serving.prompts import Row, rows_done
from zconvert.serving.timing import Known, Times
from zconvert.training.parallel import Parallel
from zconvert.training.pipeline import fingerprint
from zconvert.training.state import load_latest, save_state, states_in

ROWS = [Row(line=1, prompt="the cat"), Row(line=2, prompt="sat on")]
TEXT = json.dumps({"index": 0, "prompt": "the cat", "text": " sat"}).encode() + b"\n"
NEXT = json.dumps({"index": 1, "prompt": "sat on", "text": " it"}).encode()


def test_a_file_of_texts_goes_on_wherever_its_last_line_was_cut(tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    for end in range(len(NEXT) + 1):
        out.write_bytes(TEXT + NEXT[:end])
        assert rows_done(out, ROWS) == {0}
        assert out.read_bytes() == TEXT


@pytest.mark.parametrize("content", [b"notes", b'{"prompt": "the cat"}', TEXT + b"notes", b'{"index": 7}\n', b"\xff"])
def test_a_file_of_something_else_is_refused_and_loses_no_byte(content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "notes"
    out.write_bytes(content)
    with pytest.raises(UserError, match="is not the text of one of these prompts"):
        rows_done(out, ROWS)
    assert out.read_bytes() == content


def test_samples_go_on_wherever_their_last_line_was_cut_also_within_a_character(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    samples = [{"task_id": "a", "sample": number, "completion": "schön 好 🙂"} for number in range(2)]
    one, two = (json.dumps(sample, ensure_ascii=False).encode() + b"\n" for sample in samples)
    for end in range(len(two)):
        path.write_bytes(one + two[:end])
        assert read_lines(path) == samples[:1]
        open_to_append(path).close()
        assert path.read_bytes() == one
    path.write_bytes(one + two)
    assert read_lines(path) == samples


def test_samples_on_a_full_disk_end_with_one_clear_error_and_go_on_afterwards(tmp_path: Path) -> None:
    sample = {"task_id": "a", "sample": 0, "completion": "x" * 900}
    with small_disk(tmp_path / "disk", "8k") as disk:
        path = disk / "samples.jsonl"

        def fill() -> None:
            with open_to_append(path) as file:
                for _ in range(9):
                    append(file, sample)

        with pytest.raises(UserError, match=f"{path} cannot be written: the disk is full"):
            fill()
        there = read_lines(path)
        assert there == [sample] * len(there)
        subprocess.run(["mount", "-o", "remount,size=16k", str(disk)], check=True)
        fill()
        assert read_lines(path) == [sample] * (len(there) + 9)


def test_a_checkpoint_on_a_read_only_disk_keeps_no_times_and_hinders_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        Known(Times("this", {1: {1: 0.1}}), file=disk / TUNING_FILE).save()
        assert list(disk.iterdir()) == []


def test_who_decodes_or_evaluates_a_checkpoint_does_not_change_it(base: Base, tmp_path: Path) -> None:
    """A pipeline that starts from it goes on, and what is made of it is the same."""
    checkpoint = tmp_path / "init"
    shutil.copytree(base.path("init"), checkpoint)
    before, files = fingerprint(str(checkpoint)), companions(checkpoint).keys()
    Known(Times("this", {1: {1: 0.1}}), file=checkpoint / TUNING_FILE).save()
    write_file(checkpoint / "evaluation" / "results.json", "{}")
    assert fingerprint(str(checkpoint)) == before
    assert companions(checkpoint).keys() == files


def test_a_state_that_was_just_saved_is_kept_whatever_later_ones_are_there(tmp_path: Path) -> None:
    """A newest state that is damaged is passed over: the run saves behind it."""
    alone, told = Parallel(), list[str]()
    for step in (4, 8):
        save_state(tmp_path, step, {"step": step}, {"weight": torch.ones(1)}, 2, alone)
    (states_in(tmp_path)[-1][1] / "state.pt").write_bytes(b"damaged")
    save_state(tmp_path, 6, {"step": 6}, {"weight": torch.ones(1)}, 1, alone)
    found = load_latest(tmp_path, told.append, alone)
    assert found is not None
    assert found.numbers == {"step": 6}
    save_state(tmp_path, 8, {"step": 8}, {"weight": torch.ones(1)}, 1, alone)
    assert [step for step, _ in states_in(tmp_path)] == [8]
