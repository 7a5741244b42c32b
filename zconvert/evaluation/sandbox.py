"""Runs generated code apart from this process: an interpreter of its own, limits, and walls where the system has them.

What it protects from, and what it does not, is told in docs/evaluation.md.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import temporary_folder
from zconvert.errors import UserError

_CELL = Path(__file__).with_name("sandbox_cell.py")
_GRACE = 20.0
"""seconds beyond the sample's own for starting, judging and cleaning up"""
_numbers = itertools.count(os.getpid())


@dataclass(frozen=True)
class Limits:
    """What a sample may use; for tests by cases, at each of them."""

    seconds: float = 10.0
    memory_mb: int = 2048
    """address space of each process"""
    processes: int = 16
    """processes and threads beside the first"""
    files: int = 64
    """open at a time"""
    output_mb: int = 8
    """of output, and of any file"""
    disk_mb: int = 64
    """of all files together, where the sample has a file system of its own"""


@dataclass(frozen=True)
class Program:
    """A sample and how to tell whether it is right; one of `tests` and `cases`."""

    code: str
    tests: str | None = None
    """source that runs after the sample, among its names, and raises where it is wrong"""
    cases: tuple[tuple[str, str], ...] | None = None
    """input and expected output: on stdin and stdout, or of `function` as JSON (a line for each argument)"""
    function: str | None = None
    """what is tested: a function, or a method of the class `Solution`"""


@dataclass(frozen=True)
class Outcome:
    """How a sample did."""

    passed: bool
    reason: str
    """passed, wrong, error, timeout, memory, output, forbidden, killed, incomplete, left processes behind, crashed"""
    detail: str = ""
    walls: tuple[str, ...] = ()
    """what a namespace kept apart: processes, network, files"""


def run_code(program: Program, limits: Limits | None = None, *, guard: bool = True, namespaces: bool = True) -> Outcome:
    """Runs a sample and its tests.

    Args:
        program: the sample; not trusted.
        limits: None: the defaults.
        guard: stop a sample that opens files to write elsewhere, signals others, starts processes or uses the network.
        namespaces: have the kernel keep it apart, where that is allowed.

    Raises:
        UserError: this system cannot run samples.
    """
    if sys.platform == "win32":
        raise UserError("generated code cannot be run on Windows", fix="score the samples on Linux, or in WSL")
    limits = limits or Limits()
    cases = program.cases or ()
    job = _job(program, limits, guard=guard, namespaces=namespaces)
    seconds = limits.seconds * max(len(cases), 1) + _GRACE
    with temporary_folder("zconvert-sample-") as folder:
        os.chmod(folder, 0o777)  # a sample of root's runs as another user
        cell = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CELL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"TMPDIR": str(folder), "HOME": str(folder), "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            said, complaint = cell.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timeout")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(cell.pid, signal.SIGKILL)
            cell.kill()
            cell.communicate()
    try:
        verdict = json.loads(said)
    except ValueError:
        return Outcome(False, "crashed", complaint.decode(errors="replace").strip()[-300:])
    return Outcome(verdict["passed"], verdict["reason"], verdict["detail"], tuple(verdict["held"]))


def check_sandbox() -> Outcome:
    """Runs a program that passes.

    Returns:
        its outcome, which names the walls that this system gives.

    Raises:
        UserError: it did not pass, so that nothing that is run here could be judged.
    """
    outcome = run_code(Program("import json, math\nanswer = math.gcd(4, 6)", tests="assert answer == 2"))
    if not outcome.passed:
        raise UserError(
            "generated code cannot be run here",
            found=f"{outcome.reason}: {outcome.detail}",
            expected="a Python that a process with little memory and no rights can run",
            fix="--no-score makes the samples here; score them on another machine, or outside of the container",
        )
    return outcome


def _job(program: Program, limits: Limits, *, guard: bool, namespaces: bool) -> dict[str, Any]:
    megabyte = 1024 * 1024
    job: dict[str, Any] = {
        "code": program.code,
        "function": program.function,
        "guard": guard,
        "namespaces": namespaces,
        "number": next(_numbers),
        "limits": {
            "seconds": limits.seconds,
            "memory": limits.memory_mb * megabyte,
            "processes": limits.processes,
            "files": limits.files,
            "output": limits.output_mb * megabyte,
            "disk": limits.disk_mb * megabyte,
        },
    }
    if program.cases is not None:
        return {**job, "cases": [{"input": text, "output": expected} for text, expected in program.cases]}
    return {**job, "tests": program.tests or ""}
