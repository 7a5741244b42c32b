"""The folder of an evaluation: samples as they are made, scores, and what the samples depend on.

    settings.json                     checkpoint, sampling and tasks; an evaluation that goes on must agree with it
    samples/TASK/COLUMN.jsonl         a sample a line, in the order in which they ended: `task_id`, `completion`, …
    scores/TASK/COLUMN.jsonl          made from these, as often as one likes
    results.json, report.html, *.png  made from both

`task_id` and `completion` are what HumanEval's and EvalPlus' own scorers read. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import add_line, write_file, writing
from zconvert.errors import UserError
from zconvert.formats import EVALUATION, up_to_date

SETTINGS_FILE = "settings.json"
RESULTS_FILE = "results.json"
FREE = ("tasks", "columns", "n", "k", "margin")
"""settings that may differ when an evaluation goes on; batch size and machine may not, since speeds would be mixed"""

Sample = dict[str, Any]
Key = tuple[str, int]
"""a problem's name and the number of the sample"""


def samples_file(folder: Path, task: str, column: str) -> Path:
    """Where a column's samples of a task are."""
    return folder / "samples" / task / f"{_file_name(column)}.jsonl"


def scores_file(folder: Path, task: str, column: str) -> Path:
    """Where their scores are."""
    return folder / "scores" / task / f"{_file_name(column)}.jsonl"


def _file_name(column: str) -> str:
    return column.replace(":", "-")


def key_of(sample: Sample) -> Key:
    """Which sample of which problem it is."""
    return sample["task_id"], sample["sample"]


def read_lines(path: Path) -> list[Sample]:
    """The rows of a file of samples or scores; none where it does not exist. A last line without an end is left out.

    Raises:
        UserError: a line is no row.
    """
    try:
        content = path.read_bytes()  # whose end may be half a character
    except FileNotFoundError:
        return []
    rows: list[Sample] = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            key_of(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"line {number} of {path} is no sample",
                found=line[:80].decode(errors="replace"),
                fix="remove the line, and run it again",
            ) from error
        rows.append(row)
    return rows


def open_to_append(path: Path) -> FileIO:
    """Opens a file of samples to go on with; a last line that was cut short by an interrupt is removed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        end = file.seek(0, 2)
        while end and (file.seek(end - 1), file.read(1))[1] != b"\n":
            end -= 1
        file.truncate(end)
        file.close()
        return path.open("ab", buffering=0)


def append(file: FileIO, sample: Sample) -> None:
    """Adds a sample; it is in the file when this returns."""
    add_line(file, json.dumps(sample, ensure_ascii=False))


def write_whole(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSONL file that appears whole."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON file that appears whole."""
    write_file(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an evaluation.

    Raises:
        UserError: the folder is none of an evaluation, or is one of a newer zconvert.
    """
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not the folder of an evaluation",
            found=f"{SETTINGS_FILE}: {error.strerror if isinstance(error, OSError) else error}",
            expected="what `zconvert evaluate` wrote",
            fix="give its --out; without one it is evaluation/ in the run's folder",
        ) from error
    assert isinstance(found, dict), "zconvert wrote it"
    return up_to_date(found, folder / SETTINGS_FILE, EVALUATION)


def go_on_with(folder: Path, settings: dict[str, Any]) -> None:
    """Writes an evaluation's settings; where it began before, they must agree with what it began with.

    Raises:
        UserError: something changed that the samples depend on.
    """
    if (folder / SETTINGS_FILE).exists():
        before = read_settings(folder)
        changed = list(_changes(before, settings))
        if changed:
            raise UserError(
                f"{folder} has an evaluation with other settings",
                found="\n".join(changed),
                expected="the settings it began with; n, k, tasks and samplers may change",
                fix="choose another --out, or remove that folder",
            )
    write_json(folder / SETTINGS_FILE, settings)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        was, is_now = before.get(key), now.get(key)
        if key in FREE or was == is_now:
            continue
        told = f"{key} was {_short(was)} and is {_short(is_now)}"
        yield told if _short(was) != _short(is_now) else f"{key} {_short(was)} has changed"
    for name in before["tasks"].keys() & now["tasks"].keys():
        was, is_now = before["tasks"][name]["asked"], now["tasks"][name]["asked"]
        if was != is_now:
            keys = ", ".join(key for key in is_now if was.get(key) != is_now[key])
            yield f"the task {name} has changed in {keys}"


def _short(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:  # a checkpoint
        return str(value["name"])
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
