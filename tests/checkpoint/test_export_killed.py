"""An export that is killed leaves no folder under its name; a push that is killed leaves the repository as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.loopback_hub import LoopbackHub, serve
from tests.checkpoint.pushed import TOKEN, Pushes
from zconvert.checkpoint.export import export
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.source import resolve

KILLS = 20
EXPORT = """
import sys
from pathlib import Path
from zconvert.checkpoint.export import export
from zconvert.checkpoint.source import resolve
source = resolve(sys.argv[1])
print("begins", flush=True)
export(source, Path(sys.argv[2]), max_shard_size=20_000)
"""


@pytest.mark.slow
def test_an_export_killed_at_any_moment_is_complete_or_absent(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    convert_init(resolve(tiny_checkpoint("zaya", shards=3)), tmp_path / "converted", block_size=4)
    seconds = [time_of(tmp_path / "converted", tmp_path / f"whole-{n}") for n in range(2)]
    whole = {p.relative_to(tmp_path / "whole-0").as_posix() for p in (tmp_path / "whole-0").rglob("*")}
    chance, absent = random.Random(0), 0
    for kill in range(KILLS):
        out = tmp_path / f"killed-{kill}"
        process = begin(tmp_path / "converted", out)
        time.sleep(chance.uniform(0, max(seconds)))
        process.kill()
        process.wait()
        if out.exists():
            assert {p.relative_to(out).as_posix() for p in out.rglob("*")} == whole
            read_headers(out)
        else:
            absent += 1
            export(resolve(tmp_path / "converted"), out)  # what a kill left is in nobody's way
    assert absent > KILLS // 4


def begin(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
    """Starts an export; returns when it begins to work."""
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def time_of(checkpoint: Path, out: Path) -> float:
    process = begin(checkpoint, out)
    started = time.monotonic()
    assert process.wait() == 0
    return time.monotonic() - started


def test_a_push_killed_in_the_middle_goes_on_where_it_was(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    convert_init(resolve(tiny_checkpoint("mixtral", shards=3)), tmp_path / "converted", block_size=4)
    (tmp_path / "hub").mkdir()
    in_the_middle = threading.Event()
    with serve(LoopbackHub({}, pushes=Pushes(tmp_path / "hub"))) as hub:
        pushes = hub.pushes
        assert pushes is not None

        def hold(number: int, received: int) -> bool:
            if number == 1 and received > 4000:
                in_the_middle.set()
                time.sleep(0.05)
            return True

        def begin_push() -> subprocess.Popen[str]:
            environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_TOKEN": TOKEN}
            command = [sys.executable, "-m", "zconvert", "export", str(tmp_path / "converted"), "--no-verify"]
            return subprocess.Popen(
                [*command, "--hub", "org/name"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )

        pushes.on_upload = hold
        process = begin_push()
        assert in_the_middle.wait(120)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        repository = pushes.repositories["org/name"]
        assert repository.messages == ["initial commit"]
        arrived = {path.name for path in (pushes.root / "objects").iterdir()}
        assert len(arrived) == 1

        pushes.on_upload, before = (lambda *_: True), len(pushes.received)
        process = begin_push()
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert f"Pushed to {hub.endpoint}/org/name" in out
        assert "Uploading model-" in err
        assert TOKEN not in out + err
        assert arrived.isdisjoint(sha for sha, _ in pushes.received[before:])
        folder = repository.commits[repository.branches["main"]]
    export(resolve(tmp_path / "converted"), tmp_path / "local" / "name")
    assert files_of(folder).items() >= files_of(tmp_path / "local" / "name").items()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
