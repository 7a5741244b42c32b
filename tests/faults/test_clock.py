"""A clock that jumps changes nothing of a run: durations are measured by one that cannot."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

from tests.faults.commands import COMMANDS, Base
from tests.faults.inject import run
from tests.training.runs import metrics_of

YEAR = 365 * 86400


def test_a_clock_that_jumps_changes_no_step_no_save_and_no_speed(base: Base, tmp_path: Path) -> None:
    def jump() -> None:
        now, jumped = time.time, itertools.cycle((0, YEAR, -YEAR, -2 * YEAR, -time.time()))
        time.time = lambda: max(0.0, now() + next(jumped))
        time.time_ns = lambda: int(time.time() * 1e9)

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
