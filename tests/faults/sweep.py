"""Fails each command at each of its operations on files, and counts what survives.

python -m tests.faults.sweep [COUNT] [COMMAND …]     at COUNT places for each fault, or at all; prints a table

Ctrl-C ends it with the table of what was done: the commands take turns.
"""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tests.conftest  # noqa: F401 - forks get threads of their own, here as under pytest
import zconvert.checkpoint.export
from tests.faults import inject
from tests.faults.commands import COMMANDS, Base, contents, make_base

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


@dataclass
class Tally:
    """What a command went through."""

    injected: int = 0
    bytes_lost: int = 0
    """of input, of earlier results, and of finished ones that are not what they would be"""
    problems: list[str] = field(default_factory=list)
    """what did not survive, in words"""

    @property
    def failed(self) -> int:
        """Faults that did not end as they should."""
        return len({problem.split(": ")[0] for problem in self.problems})

    def add(self, other: Tally) -> None:
        """Sums up."""
        self.injected += other.injected
        self.bytes_lost += other.bytes_lost
        self.problems += other.problems


class Sweep:
    """One command, failed again and again at the same place on disk."""

    def __init__(self, name: str, base: Base, work: Path) -> None:
        """Runs it once without a fault: what comes of it is what must come of it later.

        Args:
            name: of the command.
            base: the inputs.
            work: folder to make for its output, again and again.
        """
        self.name, self.command, self.base, self.work = name, COMMANDS[name], base, work
        self._inputs = contents(base.folder)
        self._start()
        counting = self._run(inject.Injector(work))
        assert counting.code == 0, f"{name}: {counting.stderr}"
        self.operations = counting.operations
        self.expected = self._results()
        self.needed = sum(path.stat().st_blocks * 512 for path in self.work.rglob("*"))
        assert all((work / final).exists() for final in (*self.command.finals, *self.command.grows))

    def fail(self, fault: int | signal.Signals, at: int) -> Tally:
        """Fails the command at one operation, looks what is there, and runs it again."""
        where = f"{self.name}, {named(fault)} at {at}, about {self.operations[at : at + 1]}"
        self._start()
        before = contents(self.work)
        failed = self._run(inject.Injector(self.work, at, fault))
        return self._judge(where, fault, failed, before) if failed.met else Tally()

    def fill(self, disk: Path, share: float) -> Tally:
        """Runs the command on a disk with room for a share of what it needs, then on one with enough.

        Args:
            disk: a tmpfs that the work lies on.
            share: of the bytes that were there at its end.
        """
        self._start()
        before = contents(self.work)
        used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
        remount(disk, f"size={(used + int(share * self.needed)) // 1024 + 1}k")
        failed = self._run()
        remount(disk, f"size={(used + 4 * self.needed) // 1024 + 64}k")
        return self._judge(f"{self.name}, a disk of {share:.0%}", errno.ENOSPC, failed, before)

    def on_read_only_disk(self, disk: Path) -> Tally:
        """Runs the command where nothing can be written, then where it can."""
        self._start()
        before = contents(self.work)
        remount(disk, "ro")
        failed = self._run()
        remount(disk, "rw")
        return self._judge(f"{self.name}, a read-only disk", errno.EROFS, failed, before)

    def boundaries(self) -> list[int]:
        """The first and the last operation of each output, by the names of files and folders in the work."""
        outputs = [operation.split("/")[1].strip(".").split(".")[0] for operation in self.operations]
        changes = [at for at in range(1, len(outputs)) if outputs[at] != outputs[at - 1]]
        return sorted({0, *changes, *(at - 1 for at in changes), len(outputs) - 1})

    def _judge(self, where: str, fault: int | signal.Signals, failed: inject.Outcome, before: dict[str, str]) -> Tally:
        """Looks at what a fault left, and runs the command again."""
        tally = Tally(injected=1)

        def problem(text: str, found: object = "") -> None:
            tally.problems.append(f"{where}: {text} {found}")

        if failed.code != 0:
            for text in self._wrongly_told(fault, failed):
                problem(text, failed.stderr)
        for final in self.command.finals:
            if (self.work / final).exists() and not self._whole(final):
                problem(f"{final} is half-written")
        tally.bytes_lost += self._lost(before, problem)
        again = self._run()
        done = again.code == 0 or (
            any(words in again.words for words in self.command.again) and all(map(self._whole, self.command.finals))
        )
        if not done:
            problem("run again, it fails:", again.stderr)
        if (found := self._results()) != self.expected:
            wrong = [name for name in self.expected.keys() | found.keys() if self.expected.get(name) != found.get(name)]
            problem("run again, it gives other files:", wrong)
            tally.bytes_lost += sum(self._size(name) for name in wrong)
        left = [path.name for path in self.work.rglob(".*")]
        # Killed, or where nothing can be removed, it may leave locks behind, which hold nothing.
        if isinstance(fault, signal.Signals) or fault == errno.EROFS:
            left = [name for name in left if not name.endswith(".lock")]
        if left:
            problem("hidden files are left:", left)
        return tally

    def _start(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.command.begin(self.base, self.work)
        self._arguments = self.command.arguments(self.base, self.work)

    def _run(self, injector: inject.Injector | None = None) -> inject.Outcome:
        return inject.run(self._arguments, injector, _prepare)

    def _results(self) -> dict[str, str]:
        return {name: value for name, value in contents(self.work).items() if "/." not in f"/{name}"}

    def _whole(self, final: str) -> bool:
        expected = {name: value for name, value in self.expected.items() if (name + "/").startswith(final + "/")}
        return bool(expected) and contents(self.work, final) == expected

    def _wrongly_told(self, fault: int | signal.Signals, failed: inject.Outcome) -> Iterator[str]:
        if isinstance(fault, signal.Signals):
            if failed.code != CODES[fault]:
                yield f"exit code {failed.code}:"
            if "Traceback" in failed.stderr or "rror:" in failed.stderr:
                yield "it complains:"
            return
        if failed.code != 1:
            yield f"exit code {failed.code}:"
        if failed.words.count("Error: ") != 1 or "Unexpected" in failed.words or "Traceback" in failed.words:
            yield "not one clear error:"
        if str(self.work) not in failed.words:
            yield "the place is not named:"

    def _lost(self, before: dict[str, str], problem: Callable[..., None]) -> int:
        """Bytes of input and earlier results that are not what they were; what grows may have grown."""
        lost = 0
        for folder, then in ((self.base.folder, self._inputs), (self.work, before)):
            now = contents(folder)
            for name in then:
                final = folder == self.work and any((name + "/").startswith(f + "/") for f in self.command.finals)
                grows = folder == self.work and name.startswith(self.command.grows)
                if final and self._whole(name):
                    continue
                if now.get(name) != then[name] and not (grows and name in now):
                    problem(f"{folder / name} is not what it was")
                    lost += (folder / name).stat().st_size if name in now else 1
        return lost

    def _size(self, name: str) -> int:
        path = self.work / name
        return path.stat().st_size if path.exists() else 1


def remount(disk: Path, option: str) -> None:
    """Changes how a tmpfs is mounted."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def named(fault: int | signal.Signals) -> str:
    """A fault's name, as the system has it."""
    return fault.name if isinstance(fault, signal.Signals) else errno.errorcode[fault]


def _prepare() -> None:
    # It starts an interpreter of its own, which takes longer than all the rest, and writes nothing.
    zconvert.checkpoint.export.verify_export = lambda *_, **__: {"skipped": "in a sweep"}  # type: ignore[attr-defined]


def sample(count: int, most: int | None, seed: str) -> list[int]:
    """Numbers below `count`, each once and in an order that the seed fixes: all, or the first so many of them."""
    return random.Random(seed).sample(range(count), count)[:most]


def main(arguments: Sequence[str]) -> int:
    """Sweeps, and prints a table in Markdown: of each fault, how many were survived of those injected."""
    most = next((int(word) for word in arguments if word.isdecimal()), None)
    names = [word for word in arguments if not word.isdecimal()] or list(COMMANDS)
    faults = (*ERRORS, *SIGNALS)
    tallies = {name: {fault: Tally() for fault in faults} for name in names}
    with tempfile.TemporaryDirectory(prefix="zconvert-faults-") as folder:
        base = make_base(Path(folder) / "base")
        sweeps = {name: Sweep(name, base, Path(folder) / "work") for name in names}
        with contextlib.suppress(KeyboardInterrupt):
            for name, fault, at in _in_turns({name: len(sweeps[name].operations) for name in names}, faults, most):
                tallies[name][fault].add(sweeps[name].fail(fault, at))
    print(f"| command | operations | {' | '.join(map(named, faults))} | all | bytes lost |")
    print(f"|---|---|{'---|' * (len(faults) + 2)}")
    for name in names:
        print(_row(f"`{name}`", len(sweeps[name].operations), tallies[name].values()))
    problems = [problem for each in tallies.values() for tally in each.values() for problem in tally.problems]
    print("\n".join(problems), file=sys.stderr)
    return int(bool(problems))


def _in_turns(
    counts: Mapping[str, int], faults: Sequence[int | signal.Signals], most: int | None
) -> Iterator[tuple[str, int | signal.Signals, int]]:
    """Every command and fault at one place, then all at their next: whenever it ends, all have had their share."""
    places = {
        (name, fault): sample(count, most, f"{name}, {named(fault)}")
        for name, count in counts.items()
        for fault in faults
    }
    for turn in range(max(map(len, places.values()))):
        yield from ((*key, numbers[turn]) for key, numbers in places.items() if turn < len(numbers))


def _row(name: str, operations: int, tallies: Iterable[Tally]) -> str:
    parts, total = list(tallies), Tally()
    for part in parts:
        total.add(part)
    cells = [f"{part.injected - part.failed}/{part.injected}" for part in (*parts, total)]
    return f"| {name} | {operations} | {' | '.join(cells)} | {total.bytes_lost} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
