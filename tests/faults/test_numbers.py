"""Numbers that are not finite stop a run before they reach weights or a train state, and it is said where."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.processes import finish, for_processes, start
from tests.training.runs import make_run, metrics_of
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe
from zconvert.training import stages
from zconvert.training.loop import Trainer
from zconvert.training.objective import LossSums
from zconvert.training.observers import Observer
from zconvert.training.state import states_in

BAD_STEP = 3


def train(settings: dict[str, Any], *observers: Observer) -> Path:
    return stages.train(MidtrainRecipe(**settings), lambda _progress: None, observers)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return make_run(tmp_path, max_steps=5, save_steps=1, save_total_limit=9, save_dtype="float32")


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_is_told_with_step_stage_and_documents_and_spoils_nothing(
    value: float, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, forwards = Trainer._sums, []

    def spoilt(self: Trainer, *args: Any) -> LossSums:
        sums = stock(self, *args)
        forwards.append(1)
        if len(forwards) == 2 * BAD_STEP:  # the second of the step's micro-batches
            sums.diffusion = sums.diffusion * value
        return sums

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_sums", spoilt)
        with pytest.raises(UserError, match=f"the loss is {value} at step {BAD_STEP} of midtrain") as caught:
            train(settings)
    assert caught.value.found is not None
    assert "document" in caught.value.found
    assert "data.jsonl" in caught.value.found
    states = [step for step, _ in states_in(tmp_path / "run")]
    assert states == [1, 2]
    assert goes_on(settings, tmp_path)


def test_a_gradient_that_is_not_finite_is_not_stepped_on(settings: dict[str, Any], tmp_path: Path) -> None:
    class Spoil(Observer):
        def on_step(self, trainer: Trainer) -> None:  # type: ignore[override]
            if trainer.step == BAD_STEP - 1:
                parameter = next(trainer.trained.parameters())
                parameter.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(UserError, match=f"the gradient's norm is (nan|inf) at step {BAD_STEP}"):
        train(settings, Spoil())
    assert [step for step, _ in states_in(tmp_path / "run")] == [1, 2]
    assert goes_on(settings, tmp_path, Observer())


@pytest.mark.parametrize("what", ["weights", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_weights_and_optimizers_that_are_not_finite_are_not_saved(
    what: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    class Spoil(Observer):
        def on_step(self, trainer: Trainer) -> None:  # type: ignore[override]
            if trainer.step == BAD_STEP:
                parameter = next(trainer.trained.parameters())
                spoilt = parameter if what == "weights" else trainer.optimizer.state[parameter]["exp_avg_sq"]
                with torch.no_grad():
                    spoilt.view(-1)[0] = math.inf

    with pytest.raises(UserError, match=f"step {BAD_STEP} of midtrain left numbers that are not finite") as caught:
        train(settings, Spoil())
    assert caught.value.found is not None
    assert caught.value.found.startswith("model." if what == "weights" else "optimizer.")
    assert [step for step, _ in states_in(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert goes_on(settings, tmp_path, Observer())


def goes_on(settings: dict[str, Any], tmp_path: Path, *observers: Observer) -> bool:
    """Whether the same run, without the fault, ends as one that never met it."""
    train(settings, *observers)
    train({**settings, "output_dir": str(tmp_path / "whole")})
    return metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


SPOIL_ONE = """
import json, os, sys
from zconvert.recipe import MidtrainRecipe
from zconvert.training import stages
from zconvert.training.loop import Trainer
stock, forwards = Trainer._sums, []
def spoilt(self, *args):
    sums = stock(self, *args)
    forwards.append(1)
    if len(forwards) == 5 and os.environ["RANK"] == "1":
        sums.ar = sums.ar * float("nan")
    return sums
Trainer._sums = spoilt
try:
    stages.train(MidtrainRecipe(**json.loads(sys.argv[1])), lambda _progress: None)
except Exception as error:
    print(f"rank {os.environ['RANK']}: {error.what}; {error.found}", flush=True)
    os._exit(7)
"""


@pytest.mark.slow
def test_all_processes_stop_at_the_step_in_which_one_of_them_met_it(settings: dict[str, Any], tmp_path: Path) -> None:
    two = for_processes(settings, 2)
    processes = start([sys.executable, "-c", SPOIL_ONE, json.dumps(two)], 2, tmp_path / "log")
    codes = [process.wait(400) for process in processes]
    finish(processes)
    told = sorted(line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("rank"))
    assert codes == [7, 7]
    assert len(told) == 2, told
    assert told[0].removeprefix("rank 0") == told[1].removeprefix("rank 1")
    assert "the loss is nan at step 3 of midtrain" in told[0]
