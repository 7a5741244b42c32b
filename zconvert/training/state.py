"""Train states on disk: written whole or not at all, the newest readable one wins.

    RUN_DIR/train_state/step-00000100/state.pt

A state is a dict of tensors, numbers and strings (weights, optimizer, data position, random numbers). It is read with
`weights_only`, so that a state can hold no code.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zconvert.errors import UserError

_STEP = re.compile(r"step-(\d{8,})")


def states_in(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the states of a run, oldest first."""
    folder = run_dir / "train_state"
    found = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(match.group(1)), path) for match, path in found if match)


def save_state(run_dir: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the state after `step` steps and removes all but the newest `keep`.

    Raises:
        UserError: the disk is full or not writable; earlier states are as they were.
    """
    final = run_dir / "train_state" / f"step-{step:08d}"
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        with (partial / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():  # the same step, saved by a run that this one resumed behind: the same state
            shutil.rmtree(final)
        partial.rename(final)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the train state of step {step} could not be written to {final}",
            found=error,
            fix="free some disk space; the run continues from the newest state when started again",
        ) from error
    for _, old in states_in(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in final.parent.glob(".step-*.partial-*"):  # of runs that were killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def load_state(folder: Path) -> dict[str, Any]:
    """Reads one state.

    Raises:
        UserError: it is damaged.
    """
    try:
        return torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"the train state {folder} is damaged", found=error, fix="remove this folder") from error


def load_latest(run_dir: Path, on_warning: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest state that can be read, or None where there is none; damaged ones are reported and passed over."""
    for _, folder in reversed(states_in(run_dir)):
        try:
            return load_state(folder)
        except UserError as error:
            on_warning(f"{error.what}; trying the one before")
    return None
