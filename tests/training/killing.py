"""Kills a run again and again, at moments of every kind, and lets it end.

python -m tests.training.killing FOLDER KILLS    trains FOLDER/whole without a stop, and FOLDER/run with so many kills

Trainers are forks of this process, which has imported everything once. It is a process of its own, without threads: a
fork takes along the locks that other threads hold just then, and garbage whose clean-up may close what is not its own.
pytest's process has both, after other tests.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.training.runs import make_run
from zconvert.recipe import MidtrainRecipe
from zconvert.training import stages
from zconvert.training.state import states_in

MOMENTS = ("start", "start", "save", "step")
"""by turns: before the first step is done, twice, so that a kill's remains are met by one who is killed; as soon as a
save begins; somewhere between saves"""
_PATIENCE = 240
"""seconds without progress until a trainer says where it is, and ends"""


def main(folder: Path, kills: int) -> None:
    """Prints how many kills met the moment that they were meant for, by kind."""
    assert threading.active_count() == 1
    settings = make_run(folder, save_dtype="float32", save_steps=1, max_steps=150, micro_batch_size=1)
    began = time.monotonic()
    whole = _forked({**settings, "output_dir": str(folder / "whole")})
    _await_state(folder / "whole", [], whole)
    start = time.monotonic() - began
    assert os.waitpid(whole, 0)[1] == 0
    run_dir, moments, met = folder / "run", random.Random(0), Counter[str]()
    for kill in range(kills):
        moment, before, process = MOMENTS[kill % len(MOMENTS)], states_in(run_dir), _forked(settings)
        if moment == "start":
            time.sleep(moments.uniform(0, start))
        else:
            _await_state(run_dir, before, process)
        if moment == "save":
            while not _saving(run_dir):
                pass
        elif moment == "step":
            time.sleep(moments.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL, f"it ended by itself, after {kill} kills"
        met[moment] += _saving(run_dir) if moment == "save" else (states_in(run_dir) == before) == (moment == "start")
    assert os.waitpid(_forked(settings), 0)[1] == 0
    print(json.dumps(met))


def _forked(settings: dict[str, Any]) -> int:
    """Trains in a fork; its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            wait = lambda _progress: faulthandler.dump_traceback_later(_PATIENCE, exit=True)  # noqa: E731
            wait(None)
            stages.train(MidtrainRecipe(**settings), wait)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def _await_state(run_dir: Path, before: list[tuple[int, Path]], process: int) -> None:
    while states_in(run_dir) == before:
        assert os.waitpid(process, os.WNOHANG) == (0, 0), f"it ended by itself, after the states {before}"
        time.sleep(0.001)


def _saving(run_dir: Path) -> bool:
    return any((run_dir / "train_state").glob(".step-*"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
