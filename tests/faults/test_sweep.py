"""Whatever fails while a command writes: one clear error, earlier results untouched, and the same command mends it."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest

from tests.checkpoint.disk import small_disk
from tests.faults.commands import COMMANDS, Base
from tests.faults.sweep import ERRORS, SIGNALS, Sweep, Tally, sample

WRITERS = [name for name in COMMANDS if name not in ("plan --heatmap", "bench --plot", "recipes copy")]


def swept(sweep: Sweep, faults: dict[int | signal.Signals, list[int]]) -> Tally:
    tally = Tally()
    for fault, numbers in faults.items():
        for at in numbers:
            tally.add(sweep.fail(fault, at))
    return tally


@pytest.mark.parametrize(
    ("name", "faults"),
    [("convert-init", (errno.ENOSPC, signal.SIGTERM)), ("midtrain", (errno.EIO,)), ("generate --out", (errno.ENOSPC,))],
)
def test_a_write_that_fails_or_a_signal_within_it_loses_nothing(
    name: str, faults: tuple[int | signal.Signals, ...], base: Base, tmp_path: Path
) -> None:
    sweep = Sweep(name, base, tmp_path / "work")
    tally = swept(sweep, {fault: [len(sweep.operations) // 2] for fault in faults})
    assert tally.problems == []
    assert (tally.injected, tally.bytes_lost) == (len(faults), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_fault_of_any_command_loses_anything(name: str, base: Base, tmp_path: Path) -> None:
    sweep = Sweep(name, base, tmp_path / "work")
    count = len(sweep.operations)
    tally = swept(sweep, {fault: [*sample(count, 6, f"{name}{fault}")] for fault in (*ERRORS, *SIGNALS)})
    assert tally.problems == []
    assert tally.injected >= 4 * min(6, count)
    assert tally.bytes_lost == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_pipeline_stopped_between_its_stages_goes_on(number: signal.Signals, base: Base, tmp_path: Path) -> None:
    sweep = Sweep("run", base, tmp_path / "work")
    boundaries = sweep.boundaries()
    assert len(boundaries) >= 6
    tally = swept(sweep, {number: boundaries})
    assert tally.problems == []
    assert (tally.injected, tally.bytes_lost) == (len(boundaries), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_at_any_byte_loses_nothing(name: str, base: Base, tmp_path: Path) -> None:
    """Also within what torch and safetensors write."""
    with small_disk(tmp_path / "disk", "64m") as disk:
        sweep, tally = Sweep(name, base, disk / "work"), Tally()
        for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
            tally.add(sweep.fill(disk, share))
    assert tally.problems == []
    assert tally.bytes_lost == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_read_only_is_one_clear_error(name: str, base: Base, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        sweep = Sweep(name, base, disk / "work")
        tally = sweep.on_read_only_disk(disk)
    assert tally.problems == []
    assert tally.bytes_lost == 0
