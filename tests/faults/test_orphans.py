"""Processes that a command started end with it, also where it is killed: nothing keeps its memory and its output."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

DIES = """
import os, signal
from zconvert.data.tokenising import Workers
if __name__ == "__main__":
    workers = Workers([], 2)
    print(workers._pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_that_tokenise_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        # Its output ends when nobody is left who could write to it.
        worker, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert worker.strip().isdecimal()
