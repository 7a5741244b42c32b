"""A clock that jumps changes nothing of a run: durations are measured by one that cannot."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from pathlib import Path

import pytest

from tests.faults.commands import COMMANDS, Base
from tests.faults.inject import run
from tests.faults.test_lock import held_elsewhere
from tests.training.runs import metrics_of
from zconvert.checkpoint.lock import held
from zconvert.errors import UserError

YEAR = 365 * 86400


def test_a_clock_that_jumps_changes_no_step_no_save_and_no_speed(base: Base, tmp_path: Path) -> None:
    def jump() -> None:
        now, stock, jumped = time.time, time.gmtime, itertools.cycle((0, YEAR, -YEAR, -2 * YEAR, -time.time()))
        time.time = lambda: max(0.0, now() + next(jumped))
        time.time_ns = lambda: int(time.time() * 1e9)
        time.gmtime = lambda seconds=None: stock(time.time() if seconds is None else seconds)

    # Every hour a state: no hour passes here, whatever the clock says.
    base.settings["save_minutes"] = 60
    try:
        ended = run(COMMANDS["midtrain"].arguments(base, tmp_path), prepare=jump)
    finally:
        del base.settings["save_minutes"]
    assert ended.code == 0, ended.stderr
    assert metrics_of(tmp_path / "run") == metrics_of(base.folder / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["seconds"] < 600 and row["tokens_per_second"] > 0 for row in rows)
    assert "0:00 left" in ended.words


@pytest.mark.parametrize("now", [0.0, 5e9])
def test_a_lock_holds_and_is_given_back_whatever_the_clock_says(
    now: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = time.gmtime
    with contextlib.ExitStack() as elsewhere:
        with monkeypatch.context() as patch:
            patch.setattr(time, "gmtime", lambda: stock(now))
            process = elsewhere.enter_context(held_elsewhere(tmp_path / "out"))
        with pytest.raises(UserError, match="is being written") as caught, held(tmp_path / "out"):
            pass
    assert f"process {process} on " in str(caught.value.found)
    assert ("since 1970-01-01" if now == 0 else "since 2128-06-11") in str(caught.value.found)
    with held(tmp_path / "out") as alone:
        assert alone
