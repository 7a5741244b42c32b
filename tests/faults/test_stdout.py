"""What a command prints cannot be written: a full disk is one clear error, a reader that went away is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.faults.commands import Base


def printing_to(out: int, *arguments: str, buffered: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command of `zconvert` whose stdout is this open file, which is closed afterwards."""
    command = [sys.executable, "-m", "zconvert", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(out)
    return done


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [("recipes", "list"), ("inspect", "INIT", "--json")])
def test_a_full_disk_behind_stdout_is_one_clear_error(arguments: tuple[str, ...], buffered: bool, base: Base) -> None:
    words = [base.path("init") if word == "INIT" else word for word in arguments]
    ended = printing_to(os.open("/dev/full", os.O_WRONLY), *words, buffered=buffered)
    told = " ".join(ended.stderr.split())
    assert ended.returncode == 1, told
    assert told.startswith("Error: what the command prints cannot be written found: No space left on device"), told
    assert "ignored" not in told


@pytest.mark.parametrize("arguments", [("recipes", "list"), ("inspect", "INIT", "--json")])
def test_a_reader_that_went_away_is_no_error(arguments: tuple[str, ...], base: Base) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = printing_to(writer, *(base.path("init") if word == "INIT" else word for word in arguments))
    assert ended.stderr == ""
