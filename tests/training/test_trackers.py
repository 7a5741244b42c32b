"""Experiment trackers get every row of metrics, and a missing one is told before anything is trained."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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
    assert "pip install 'zconvert[wandb]'" in str(caught.value.fix)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_every_row_in_a_project_and_leave_stdout_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a package in its place that notes what is asked of it. Run with the real ones: wandb 0.31, trackio 0.43."""
    asked: list[tuple[str, Any]] = []
    package: Any = ModuleType(name)
    package.__spec__ = ModuleSpec(name, None)
    package.config = SimpleNamespace(update=lambda values, **_: asked.append(("settings", values)))

    def init(**options: Any) -> Any:
        print("a project is made")
        asked.append(("init", options))
        return SimpleNamespace(log=lambda values, step: asked.append((f"row {step}", values)))

    package.init, package.finish = init, lambda: asked.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, package)
    settings = make_run(tmp_path, max_steps=4, logging_steps=2, trackers=[name])
    stages.train(MidtrainRecipe(**settings), lambda _: None)
    assert [what for what, _ in asked] == ["init", "settings", "row 2", "row 4", "finish"]
    notes = dict(asked)
    assert (notes["init"]["project"], notes["init"]["name"]) == ("zconvert", "run")
    assert notes["init"].get("dir") == (tmp_path / "run" if name == "wandb" else None)
    assert notes["settings"]["diffusion/block_offset"] == "random"
    assert notes["row 4"]["loss"] == metrics_of(tmp_path / "run")[-1]["loss"]
    assert {"moe/clean/entropy", "slot_accuracy/03"} <= set(notes["row 4"])
    assert "step" not in notes["row 4"], "trackio keeps that name to itself"
    said = capsys.readouterr()
    assert "a project is made" not in said.out
    assert "a project is made" in said.err


def test_text_and_nothing_are_no_numbers() -> None:
    document = {"a": None, "b": "x", "c": [], "d": [{"e": 1}], "f": True}
    assert dict(flat(document)) == {"f": True}
    assert dict(flat(document, numbers_only=False))["b"] == "x"
