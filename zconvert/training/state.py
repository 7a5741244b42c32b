"""Train states on disk: written whole or not at all, the newest whole one wins.

    RUN_DIR/train_state/step-00000100/state.pt            step, data position, random numbers
                                      shard-00001-….safetensors   weights and optimizer, a file of each process
                                      manifest.json       size and checksum of each file

Every process writes its shards; any number of processes reads them back. `state.pt` is read with `weights_only`, so
that a state can hold no code.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zconvert.checkpoint.folder import flush
from zconvert.checkpoint.run_folder import TRAIN_STATES
from zconvert.errors import UserError
from zconvert.training.parallel import Parallel

_STEP = re.compile(r"step-(\d{8,})")
_NUMBERS = "state.pt"
_MANIFEST = "manifest.json"
_CHUNK = 16 * 1024 * 1024


@dataclass(frozen=True)
class State:
    """A state that was found whole."""

    folder: Path
    numbers: dict[str, Any]
    """everything but weights and optimizer"""

    def read_into(self, tensors: dict[str, Tensor], parallel: Parallel) -> None:
        """Overwrites tensors with those of the state; sharded ones get their shard."""
        try:
            parallel.read_tensors(tensors, self.folder)
        except ValueError as error:
            raise UserError(
                f"the train state {self.folder} is not of this model or optimizer",
                found=error,
                fix="restore the recipe that it was written with, or start anew with another output_dir",
            ) from error


def states_in(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the states of a run, oldest first."""
    folder = run_dir / TRAIN_STATES
    found = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(match.group(1)), path) for match, path in found if match)


def save_state(
    run_dir: Path,
    step: int,
    numbers: dict[str, Any],
    tensors: dict[str, Tensor],
    keep: int,
    parallel: Parallel,
) -> Path:
    """Writes the state after `step` steps, all processes together, and removes all but the newest `keep`.

    Args:
        run_dir: of the run, the same folder for all processes.
        step: names the state.
        numbers: numbers, text and small tensors; the first process's are kept.
        tensors: weights and optimizer by name.
        keep: states to keep.
        parallel: the processes.

    Raises:
        UserError: the disk is full or not writable; earlier states are as they were.
    """
    final = run_dir / TRAIN_STATES / f"step-{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        parallel.together(lambda: _make_empty(partial) if parallel.first else None)
        parallel.write_tensors(tensors, partial)
        parallel.together(lambda: _write_numbers(partial, numbers) if parallel.first else None)
        names = sorted(path.name for path in partial.iterdir())
        mine = names[parallel.rank :: parallel.world]
        parts = parallel.together(lambda: {name: _flushed(partial / name) for name in mine})
        manifest = {name: entry for part in parts for name, entry in part.items()}
        parallel.together(lambda: _finish(partial, final, manifest, keep) if parallel.first else None)
    except OSError as error:
        if parallel.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the train state of step {step} could not be written to {final}",
            found=error,
            fix="free some disk space; the run continues from the newest state when started again",
        ) from error
    return final


def load_state(folder: Path, parallel: Parallel) -> State:
    """Checks and opens one state.

    Raises:
        UserError: it is damaged.
    """
    try:
        return parallel.together(lambda: _check(folder, parallel))[parallel.rank]
    except OSError as error:
        raise UserError(f"the train state {folder} is damaged", found=error, fix="remove this folder") from error


def check_start(wanted: str, run_dir: Path) -> None:
    """Refuses a start from anywhere but the newest state of a run that has some: what came later would be lost.

    Args:
        wanted: `resume_from_checkpoint` of the recipe.
        run_dir: of the run.

    Raises:
        UserError: such a start, or no state in the folder that is named.
    """
    if wanted == "auto":
        return
    if wanted != "never" and not (Path(wanted) / _MANIFEST).is_file():
        raise UserError(
            f"resume_from_checkpoint names no train state: {wanted}",
            expected="a folder such as OUTPUT_DIR/train_state/step-00000500",
            fix="name one, or set it to auto",
        )
    states = [folder for _, folder in states_in(run_dir)]
    named = Path(wanted).resolve()
    its_own = named.parent == (run_dir / TRAIN_STATES).resolve()
    if states and (wanted == "never" or (its_own and named != states[-1].resolve())):
        raise UserError(
            f"resume_from_checkpoint is {wanted}, and the run has later train states",
            found=f"{states[-1]}, the newest",
            fix="set it to auto to go on from there; or choose another output_dir, which keeps both",
        )


def load_start(wanted: str, run_dir: Path, on_warning: Callable[[str], None], parallel: Parallel) -> State | None:
    """The state that a run goes on from: its own newest one; without any, that of another run, if one is named.

    Args:
        wanted: `resume_from_checkpoint` of the recipe, which `check_start` let pass.
        run_dir: of the run.
        on_warning: is told of damaged states.
        parallel: the processes.

    Raises:
        UserError: the named one is damaged.
    """
    own = load_latest(run_dir, on_warning, parallel)
    return load_state(Path(wanted), parallel) if own is None and wanted not in ("auto", "never") else own


def load_latest(run_dir: Path, on_warning: Callable[[str], None], parallel: Parallel) -> State | None:
    """The newest whole state, or None where there is none; damaged ones are reported and passed over."""
    for folder in reversed(parallel.gather([folder for _, folder in states_in(run_dir)])[0]):
        try:
            return load_state(folder, parallel)
        except UserError as error:
            on_warning(f"{error.what} ({error.found}); trying the one before")
    return None


def _make_empty(folder: Path) -> None:
    for leftover in folder.parent.glob(".step-*"):  # of runs that were killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_numbers(folder: Path, numbers: dict[str, Any]) -> None:
    try:
        torch.save(numbers, folder / _NUMBERS)
    except RuntimeError as error:  # so torch's zip writer reports a full disk
        raise OSError(str(error)) from error


def _flushed(path: Path) -> tuple[int, int]:
    """(size, checksum) of a file that is on the disk to stay."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sum_of(path)


def _sum_of(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


def _finish(partial: Path, final: Path, manifest: dict[str, tuple[int, int]], keep: int) -> None:
    with (partial / _MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush(partial)
    if final.exists():  # the same step, damaged, or saved by a run that this one resumed behind: the same state
        final.rename(final.with_name(f".{final.name}.old"))
    partial.rename(final)
    flush(final.parent)  # before what it replaces goes
    # Later ones are damaged, or of a run that this one resumed behind: none of them counts in this one's place.
    states = [folder for _, folder in states_in(final.parent.parent)]
    for old in states[: states.index(final) + 1][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(final.with_name(f".{final.name}.old"), ignore_errors=True)


def _check(folder: Path, parallel: Parallel) -> State:
    """Reads the numbers, and this process's part of the files for their checksums."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        for name in sorted(manifest)[parallel.rank :: parallel.world]:
            if _sum_of(folder / name) != tuple(manifest[name]):
                raise OSError(f"{name} is not as it was written")
        numbers = torch.load(folder / _NUMBERS, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, LookupError, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    return State(folder, numbers)
