"""Experiment trackers, through accelerate: each row of metrics goes to them too, flat."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from zconvert.errors import UserError
from zconvert.recipe import TrainingRecipe

PROJECT = "zconvert"
"""where wandb and trackio keep runs, unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise"""
_SPREAD = ("slot_accuracy",)
"""lists of which every value is told; others are told by their mean"""


class Trackers:
    """The trackers of a run, in the one process that reports."""

    def __init__(self, recipe: TrainingRecipe) -> None:
        """Checks that the packages are there; nothing is written yet.

        Raises:
            UserError: one is not installed.
        """
        missing = [name for name in recipe.trackers if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"trackers: {', '.join(missing)} cannot be used",
                found=f"no package {missing[0]}",
                expected="an installed package",
                fix=f"pip install 'zconvert[{','.join(missing)}]', or take it out of trackers in the recipe; "
                "metrics.jsonl is written anyway",
            )
        self.recipe = recipe
        self._started: list[Any] = []

    def log(self, metrics: dict[str, Any]) -> None:
        """Tells a row of metrics; the first one starts the trackers."""
        if not self.recipe.trackers:
            return
        values = dict(flat({key: value for key, value in metrics.items() if key != "step"}))
        with redirect_stdout(sys.stderr):  # trackio prints, and stdout is for results
            if not self._started:
                self._start()
            for tracker in self._started:
                tracker.log(values, step=metrics["step"])

    def finish(self) -> None:
        """Has everything written."""
        with redirect_stdout(sys.stderr):
            for tracker in self._started:
                # trackio finishes what is under way once more as Python ends, unless its module did it.
                getattr(sys.modules[tracker.name], "finish", tracker.finish)()
        self._started = []

    def _start(self) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # what accelerate's trackers and their log go by; nothing is set up where processes are already
        run_dir = Path(self.recipe.output_dir)
        settings = dict(flat(self.recipe.model_dump(mode="json"), numbers_only=False))
        for name in self.recipe.trackers:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":
                tracker = kind(name, logging_dir=run_dir)
            else:
                places = {"dir": run_dir} if name == "wandb" else {}  # trackio has one folder for all projects
                tracker = kind(os.environ.get(f"{name.upper()}_PROJECT", PROJECT), name=run_dir.name, **places)
            tracker.start()
            tracker.store_init_configuration(settings)
            self._started.append(tracker)


def flat(document: dict[str, Any], *, numbers_only: bool = True, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers of a nested document, by their path.

    >>> dict(flat({"a": 1, "b": {"c": [1, 3], "slot_accuracy": [0.5, 0.25]}}))
    {'a': 1, 'b/c': 2.0, 'b/slot_accuracy/00': 0.5, 'b/slot_accuracy/01': 0.25}
    """
    for key, value in document.items():
        name = prefix + key
        if isinstance(value, dict):
            yield from flat(value, numbers_only=numbers_only, prefix=name + "/")
        elif isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
            if key in _SPREAD:
                yield from ((f"{name}/{number:02}", each) for number, each in enumerate(value))
            else:
                yield name, sum(value) / len(value)
        elif isinstance(value, int | float):
            yield name, value
        elif not numbers_only and value is not None:
            yield name, str(value)
