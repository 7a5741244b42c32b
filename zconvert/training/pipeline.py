"""Stages one after another: what is complete and unchanged is skipped, what changed is told, never overwritten.

Beside each stage's output stands what it was made from, `OUTPUT.inputs.json`: the recipe, and fingerprints of the base
checkpoint and the data. A training stage that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zconvert
from zconvert.checkpoint.folder import TUNING_FILE, own_file, write_file
from zconvert.checkpoint.run_folder import EVALUATION_FOLDER, RUN_CHECKPOINT
from zconvert.checkpoint.source import naming_the_recipe, resolve
from zconvert.errors import UserError
from zconvert.recipe import Recipe

_WHOLE = 256 * 1024 * 1024
_PART = 64 * 1024
_PARTS = 256
_UNIMPORTANT = {
    *("output_dir", "resume_from_checkpoint", "logging_steps", "save_steps", "save_total_limit", "num_threads"),
    *("trackers", "evaluation", "save_minutes", "checkpoint_steps"),
}
"""settings that do not change what is written"""

Status = Literal["complete", "begun", "missing"]


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline."""

    name: str
    base: str
    """checkpoint to start from: folder or Hub id"""
    revision: str | None
    output: Path
    settings: dict[str, Any]
    """of its recipe"""
    run: Callable[[], object]

    @property
    def status(self) -> Status:
        """complete, begun (a training run without its checkpoint yet) or missing."""
        trains = "max_steps" in self.settings
        if (self.output / RUN_CHECKPOINT).exists() if trains else self.output.exists():
            return "complete"
        return "begun" if self.output.exists() else "missing"

    @property
    def record(self) -> Path:
        """Where it is kept what the output was made from."""
        return self.output.with_name(f"{self.output.name}.inputs.json")


def stage_of(recipe: Recipe, run: Callable[[], object]) -> Stage:
    """The stage of a recipe.

    Args:
        recipe: any stage's.
        run: makes the output.
    """
    settings = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in _UNIMPORTANT}
    base, output = settings.pop("base_model"), Path(recipe.output_dir).expanduser()
    return Stage(recipe.stage, base, settings.pop("revision"), output, settings, run)


def export_stage(base: str, output: Path, run: Callable[[], object]) -> Stage:
    """The last stage, which has no recipe of its own."""
    return Stage("export", base, None, output, {}, run)


def run_pipeline(
    stages: Sequence[Stage], on_stage: Callable[[Stage, Status], None], *, adopt: bool = False, dry_run: bool = False
) -> None:
    """Runs what is not complete yet.

    Args:
        stages: in order; each starts from the output of the one before.
        on_stage: told of each before it is skipped (complete), continued (begun) or run (missing).
        adopt: outputs without a record are taken to be made from the inputs as they are now.
        dry_run: nothing is run; ends where a stage would run, since what follows depends on it.

    Raises:
        UserError: an output was made from other inputs, or another process is making it; nothing of it is touched.
    """
    for stage in stages:
        with contextlib.nullcontext() if dry_run else own_file(stage.record):
            status = stage.status
            inputs = inputs_of(stage)
            if status != "missing":
                _compare(stage, inputs, adopt=adopt)
            on_stage(stage, status)
            if not dry_run:
                write_file(stage.record, json.dumps(inputs, indent=2) + "\n")
                if status != "complete":
                    stage.run()
            elif status != "complete":
                return


def inputs_of(stage: Stage) -> dict[str, Any]:
    """What a stage's output depends on, as JSON holds it: settings, base checkpoint, data."""
    data = {str(file): digest(file) for place in _data_of(stage.settings) for file in _files(place)}
    with naming_the_recipe(stage.base, stage.name):
        base = fingerprint(stage.base, stage.revision)
    return {
        "zconvert": zconvert.__version__,
        "stage": stage.name,
        "recipe": stage.settings,
        "base_model": base,
        "data": data,
    }


def fingerprint(base: str, revision: str | None = None) -> str:
    """Names a checkpoint's contents: the commit of a Hub checkpoint, else a hash of a folder's files.

    Raises:
        UserError: there is no such checkpoint.
    """
    source = resolve(base, revision=revision, weights=False)
    if source.revision is not None:
        return f"{source.name}@{source.revision}"
    found = hashlib.sha256()
    for path in _files(source.folder):
        if path.relative_to(source.folder).parts[0] in (TUNING_FILE, EVALUATION_FOLDER):
            continue  # they come when others use the checkpoint
        found.update(f"{path.relative_to(source.folder)}\0{digest(path)}\n".encode())
    return found.hexdigest()


def digest(path: Path) -> str:
    """A hash of a file; of a large one of its size and of 256 places in it, which training changes all over."""
    found, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found.update(str(size).encode())
        for part in range(_PARTS):
            file.seek(part * (size - _PART) // (_PARTS - 1))
            found.update(file.read(_PART))
    return found.hexdigest()


def _files(place: Path) -> Iterator[Path]:
    """A file, or the files of a folder, hidden ones left out."""
    if place.is_file():
        yield place
    elif place.is_dir():
        inside = (path for path in sorted(place.rglob("*")) if path.is_file())
        yield from (path for path in inside if not any(part.startswith(".") for part in path.relative_to(place).parts))


def _data_of(settings: dict[str, Any]) -> Iterator[Path]:
    """Local files and folders that the datasets of a recipe are read from."""
    for dataset in settings.get("datasets", ()):
        generated = dataset.get("self_generated") or {}
        for name in (dataset.get("path"), generated.get("prompts")):
            if name is not None:
                yield Path(name).expanduser()
    if settings.get("chat_template"):
        yield Path(settings["chat_template"]).expanduser()


def _compare(stage: Stage, inputs: dict[str, Any], *, adopt: bool) -> None:
    done = "was made" if stage.status == "complete" else "was begun"
    fix = f"remove {stage.output} to make it anew, or choose another output_dir"
    try:
        before = json.loads(stage.record.read_text())
    except FileNotFoundError:
        if adopt:
            return
        raise UserError(
            f"it is not known what {stage.output} {done} from",
            found=f"no {stage.record.name} beside it",
            expected=f"the output of {stage.name} as `zconvert run` leaves it",
            fix=f"{fix}; or take it as it is with --adopt",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{stage.record} cannot be read", found=error, fix=fix) from error
    changes = list(_changes(before, inputs))
    if changes:
        raise UserError(
            f"{stage.output} {done} from other inputs than {stage.name} has now",
            found="\n".join(f"- {change}" for change in changes),
            expected="the same inputs",
            fix=f"undo the change; or {fix}",
        )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if before.get("base_model") != now["base_model"]:
        yield "the base checkpoint has changed"
    old, new = flat(before.get("recipe", {})), flat(now["recipe"])
    # A key that one of the two does not know is a default of another version.
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            yield f"{key}: {json.dumps(old[key])} then, {json.dumps(new[key])} now"
    for path in sorted({*before.get("data", {}), *now["data"]}):
        if before.get("data", {}).get(path) != now["data"].get(path):
            yield f"{path} has changed"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names.

    >>> flat({"rope": {"theta": 10.0}, "seed": 0})
    {'rope.theta': 10.0, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
