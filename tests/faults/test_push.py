"""A push whose disk fails: one clear error, a repository that is as it was or complete, and the next push mends it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.checkpoint.loopback_hub import LoopbackHub
from tests.checkpoint.pushed import TOKEN
from tests.checkpoint.test_push import REPO, hub
from tests.faults import inject
from tests.faults.commands import Base, contents
from tests.faults.sweep import ERRORS, named, sample

__all__ = ["hub"]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own


def push(base: Base, work: Path, injector: inject.Injector | None = None) -> inject.Outcome:
    """Exports the base's run and pushes it; what it writes on the way lies in `work`."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = ["export", base.path("run"), "--hub", REPO, "--no-verify", "--token", TOKEN]
    return inject.run(command, injector, lambda: setattr(tempfile, "tempdir", str(work)))


def pushed(hub: LoopbackHub) -> tuple[list[str], dict[str, str]]:
    """What was said of each commit, and the files of the last."""
    assert hub.pushes is not None
    if REPO not in hub.pushes.repositories:
        return [], {}
    repository = hub.pushes.repositories[REPO]
    return repository.messages, contents(repository.commits[repository.branches["main"]])


def forget(hub: LoopbackHub) -> None:
    """Has a Hub that was never pushed to."""
    assert hub.pushes is not None
    hub.pushes.repositories.clear()
    shutil.rmtree(hub.pushes.root)
    hub.pushes.root.mkdir()


@pytest.mark.parametrize(
    ("places", "faults"), [(2, (errno.ENOSPC,)), pytest.param(12, ERRORS, marks=pytest.mark.slow)], ids=["two", "many"]
)
def test_a_push_that_cannot_write_here_leaves_nothing_half_there(
    places: int, faults: tuple[int, ...], hub: LoopbackHub, base: Base, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    counting = push(base, work, inject.Injector(work))
    assert counting.code == 0, counting.stderr
    complete = pushed(hub)
    count = len(counting.operations)
    for fault, at in ((each, at) for each in faults for at in (0, *sample(count, places - 1, f"push, {each}"))):
        where = f"{named(fault)} at {at}, about {counting.operations[at]}"
        forget(hub)
        failed = push(base, work, inject.Injector(work, at, fault))
        if failed.code:
            assert failed.code == 1, where
            assert failed.words.count("Error: ") == 1, f"{where}: {failed.stderr}"
            assert "Unexpected" not in failed.words, f"{where}: {failed.stderr}"
            assert str(work) in failed.words, f"{where}: {failed.stderr}"
            assert pushed(hub)[0] in ([], ["initial commit"]), where
        assert fault == errno.EROFS or os.listdir(work) == [], where
        assert push(base, work).code == 0, where
        assert pushed(hub)[1] == complete[1], where
