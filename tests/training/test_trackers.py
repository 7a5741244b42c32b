"""Experiment trackers get every row of metrics, and a missing one is told before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import make_run, metrics_of
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe
from zconvert.training import stages
from zconvert.training.trackers import flat


def test_tensorboard_gets_every_row(tmp_path: Path) -> None:
    settings = make_run(tmp_path, max_steps=4, logging_steps=2, trackers=["tensorboard"])
    stages.train(MidtrainRecipe(**settings), lambda _: None)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (tmp_path / "run" / "tensorboard").glob("events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    rows = metrics_of(tmp_path / "run")
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows
    ]
    assert {"moe/clean/entropy", "slot_accuracy/00", "slot_accuracy/03"} <= set(events.Tags()["scalars"])


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = make_run(tmp_path, max_steps=2, warmup_steps=0, trackers=["wandb"])
    with pytest.raises(UserError, match="wandb cannot be used") as caught:
        stages.train(MidtrainRecipe(**settings), lambda _: None)
    assert "pip install wandb" in str(caught.value.fix)
    assert not (tmp_path / "run").exists()


def test_text_and_nothing_are_no_numbers() -> None:
    document = {"a": None, "b": "x", "c": [], "d": [{"e": 1}], "f": True}
    assert dict(flat(document)) == {"f": True}
    assert dict(flat(document, numbers_only=False))["b"] == "x"
