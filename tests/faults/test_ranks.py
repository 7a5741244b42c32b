"""One process of a run dies: the others end by themselves, within a minute and with a message, and the run goes on."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.processes import finish, for_processes, start
from tests.training.runs import make_run, metrics_of
from zconvert.training.state import states_in

DIES = """
import os, signal, sys
from zconvert.training.loop import Trainer
from zconvert.training.parallel import Parallel
where, recipe = sys.argv[1:]
holder, name = {"a step": (Trainer, "_forward"), "a save": (Parallel, "write_tensors")}[where]
stock, calls = getattr(holder, name), []
def last(*args, **named):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == os.environ["DIES"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(*args, **named)
setattr(holder, name, last)
sys.argv = ["zconvert", "midtrain", recipe]
from zconvert.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("where", ["a step", "a save"])
def test_the_others_end_within_a_minute_and_the_run_goes_on(
    where: str, dies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = for_processes(make_run(tmp_path, max_steps=5, save_steps=1, save_dtype="float32"), 2)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(settings))
    monkeypatch.setenv("DIES", str(dies))
    processes = start([sys.executable, "-c", DIES, where, str(recipe)], 2, tmp_path / "log")
    try:
        assert processes[dies].wait(500) == -signal.SIGKILL, (tmp_path / "log").read_text()
        died = time.monotonic()
        assert processes[1 - dies].wait(60) == 1
        took = time.monotonic() - died
    finally:
        finish(processes)
    told = " ".join((tmp_path / "log").read_text().split())
    assert "another process of this run has ended" in told
    assert told.count("rror:") == 1
    print(f"killed in {where}: the other one ended after {took:.1f} s")
    before = [step for step, _ in states_in(tmp_path / "run")]

    again = start([sys.executable, "-m", "zconvert", "midtrain", str(recipe)], 2, tmp_path / "log")
    assert finish(again, 500) == [0, 0], (tmp_path / "log").read_text()
    assert not before or f"continuing after step {before[-1]}" in (tmp_path / "log").read_text()
    recipe.write_text(json.dumps({**settings, "output_dir": str(tmp_path / "whole")}))
    whole = start([sys.executable, "-m", "zconvert", "midtrain", str(recipe)], 2, tmp_path / "log")
    assert finish(whole, 500) == [0, 0]
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)
