"""One process writes to a place at a time: the second one is told who does, and a dead one is in nobody's way."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.commands import COMMANDS, Base, contents
from tests.faults.inject import run
from zconvert.checkpoint.folder import new_folder
from zconvert.checkpoint.lock import LOCK_FILE, held
from zconvert.errors import UserError

PLACES = {
    "convert-init": "a/init",
    "midtrain": "run",
    "export": "exported",
    "export --merge-to-ar": "source",
    "evaluate": "told",
    "score": "told",
    "report": "page",
    "bench --plot": "speed.png",
    "plan --heatmap": "map.html",
    "generate --out": "texts.jsonl",
    "recipes copy": "mine",
    "run": "init.inputs.json",
}
"""what each command holds"""
QUICK = ("convert-init", "midtrain", "generate --out")
GROW = ("midtrain", "evaluate", "score", "report")


@contextlib.contextmanager
def held_elsewhere(out: Path) -> Iterator[int]:
    """Another process that holds a place until the block ends, or it is killed; its id."""
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        with held(out):
            os.write(tell, b"x")
            signal.pause()
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)
        os.close(ready)
        os.close(tell)


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_is_held_by_one_process_and_given_back_when_it_dies(folder: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if folder:
        out.mkdir()
    with held_elsewhere(out) as process:
        with pytest.raises(UserError, match="is being written by another process") as caught, held(out):
            pass
        assert caught.value.found is not None
        assert f"process {process} on {os.uname().nodename}, since 20" in caught.value.found
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        left = out / LOCK_FILE if folder else tmp_path / ".out.lock"
        assert left.exists(), "a killed process cannot clean up"
        with held(out) as alone:
            assert alone
        assert not left.exists()


def test_a_lock_whose_file_another_took_away_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    stock, taken = fcntl.flock, []

    def take(handle: int, how: int) -> None:
        stock(handle, how)
        if not taken:  # who held it before gives it back just now
            os.unlink(tmp_path / ".out.lock")
        taken.append(handle)

    monkeypatch.setattr("fcntl.flock", take)
    with held(tmp_path / "out") as alone:
        assert alone
        assert len(taken) == 2
        assert (tmp_path / ".out.lock").exists()


def test_the_lock_is_not_in_what_is_made(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        with pytest.raises(UserError, match="another process"), new_folder(tmp_path / "out"):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "out"]


def test_what_a_killed_process_left_of_a_folder_is_removed_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    mine, others = tmp_path / ".out.partial-0123abcd", tmp_path / ".out.partial-b.partial-0123abcd"
    for leftover in (mine, others):
        leftover.mkdir()
    with new_folder(tmp_path / "out"):
        assert not mine.exists()
    assert others.exists(), "a folder of another name"


def test_a_file_system_without_locks_keeps_nobody_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with held(tmp_path / "out") as first, held(tmp_path / "out") as second:
        assert (first, second) == (False, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLACES]
)
def test_a_command_ends_at_once_where_another_process_writes(name: str, base: Base, tmp_path: Path) -> None:
    command, work = COMMANDS[name], tmp_path / "work"
    work.mkdir()
    command.begin(base, work)
    arguments = command.arguments(base, work)
    out = work / PLACES[name]
    # What grows is a folder that is there; the others appear when they are whole.
    (out if name in GROW else out.parent).mkdir(parents=True, exist_ok=True)
    before = contents(work)
    with held_elsewhere(out) as process:
        ended = run(arguments)
        assert ended.code == 1, ended.stderr
        assert f"{out} is being written by another process" in ended.words
        assert f"process {process} on " in ended.words
        now = {path: value for path, value in contents(work).items() if not path.endswith(".lock")}
        assert now == before
