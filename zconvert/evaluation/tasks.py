"""Task files, and the problems that come of a task's rows. No torch here."""

from __future__ import annotations

import base64
import difflib
import hashlib
import itertools
import json
import pickletools
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert.data.reading import RawRow, open_dataset
from zconvert.errors import UserError
from zconvert.evaluation.sandbox import Program
from zconvert.recipe import DatasetRecipe, TaskRecipe
from zconvert.recipe.loading import load_checked

FOLDER = Path(__file__).with_name("tasks")
_MOST_UNPACKED = 2**29
"""bytes; the largest tests of LiveCodeBench have a quarter of it"""
_MOST_OPERATIONS = 10
"""of a pickle that is one string; there is room for hundreds of millions"""
_STRING_OPERATIONS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_EMPTY_OPERATIONS = ("PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP")
_ROW = "one JSON object a line"
_PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*(?:\.\w+)*)\}")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A task's file and what it is called."""

    name: str
    recipe: TaskRecipe

    @property
    def is_code(self) -> bool:
        """Its answers are programs that have to be run."""
        return self.recipe.check.method == "code"


@dataclass(frozen=True)
class Problem:
    """One question of a task."""

    id: str
    messages: tuple[dict[str, str], ...]
    """as in a chat: examples as turns, and the question last"""
    target: str | None
    """the right answer; None where a program is tested"""
    row: Row

    @property
    def digest(self) -> str:
        """Changes with what is asked."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()[:16]


def names() -> list[str]:
    """The tasks that come with zconvert."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def task_file(argument: str) -> Path:
    """The file that an argument of `load_task` means."""
    text = argument.partition("=")[0]
    return FOLDER / f"{text}.yaml" if text in names() else Path(text).expanduser()


def load_task(argument: str) -> Task:
    """Finds a task.

    Args:
        argument: a shipped task's name or the path of a task file; with `=FILE` behind it, its rows come from there.

    Raises:
        UserError: there is no such task, or its file is wrong.
    """
    text, _, rows = argument.partition("=")
    path = task_file(argument)
    if text not in names() and path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(text, names(), n=1)
        raise UserError(
            f"there is no task {text}",
            expected=f"{', '.join(names())}, or a .yaml file",
            fix=f"did you mean {near[0]}?" if near else "see `zconvert tasks list`",
        )
    recipe = load_checked(path, TaskRecipe, kind="task", example="`zconvert tasks show gsm8k` is an example")
    if rows:
        dataset = recipe.dataset.model_copy(update={"path": rows})
        recipe = recipe.model_copy(update={"dataset": dataset})
    return Task(path.stem, recipe)


def problems_of(task: Task, count: int | None = None) -> list[Problem]:
    """Reads a task's problems, in the order of its rows.

    Args:
        task: from `load_task`.
        count: how many, from the start; None: all.

    Raises:
        UserError: the rows cannot be had, or do not fit the task.
    """
    recipe = task.recipe
    shown = [(fill(recipe.prompt, row, where), fill(recipe.examples.answer, row, where)) for where, row in _shown(task)]
    problems: list[Problem] = []
    for where, row in _rows(recipe.dataset.path, recipe, recipe.dataset.split):
        if len(problems) == count:
            break
        name = fill(recipe.id, row, where) if recipe.id else f"{task.name}/{len(problems)}"
        asked = fill(recipe.prompt, row, where)
        target = None if task.is_code else _target(recipe, row, where)
        if task.is_code:
            program_of(task, row, "", where)  # a field that is missing is told before anything is generated
        problems.append(Problem(name, tuple(_messages(recipe, shown, asked)), target, row))
    if not problems:
        raise UserError(
            f"the task {task.name} has no problems",
            found=f"no rows in {recipe.dataset.path}",
            fix="correct dataset: in the task, or give rows: NAME=FILE",
        )
    name, times = Counter(problem.id for problem in problems).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"two problems of the task {task.name} have the same name", found=name, fix="correct `id:` in its file"
        )
    return problems


def prompt_text(task: Task, problem: Problem) -> str:
    """A problem's prompt as plain text: examples and question one after another."""
    parts = [message["content"] for message in problem.messages if message["role"] != "system"]
    pairs = [question + answer for question, answer in zip(parts[0:-1:2], parts[1:-1:2], strict=True)]
    return task.recipe.separator.join([*pairs, parts[-1]])


def program_of(task: Task, row: Row, answer: str, where: str = "the row") -> Program:
    """What is run to judge an answer of a code task.

    Raises:
        UserError: the row lacks something.
    """
    check = task.recipe.check
    assert check.program is not None, "the recipe's checks let no code task without a program pass"
    code = fill(check.program, {**row, "answer": answer}, where)
    function = None if check.function is None else fill(check.function, row, where, missing="") or None
    if check.tests is not None:
        return Program(code, tests=fill(check.tests, row, where), function=function)
    cases = [case for field in check.cases for case in _cases(row, field, where)]
    return Program(code, cases=tuple(cases), function=function)


def fill(template: str, row: Row, where: str, *, missing: str | None = None) -> str:
    """Puts a row's fields into a template.

    Args:
        template: see zconvert/recipe/task.py.
        row: field -> value.
        where: what to call the row in messages.
        missing: stands in for a field that the row lacks; None: that is an error.

    Raises:
        UserError: the row lacks a field.

    >>> fill("{a.b} \\\\boxed{} {{a}} {c}", {"a": '{"b": 7}', "c": ["x", "y"]}, "the row")
    '7 \\\\boxed{} {a} x\\ny'
    """

    def place(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value: Any = row
        for part in match[1].split("."):
            if isinstance(value, str):
                value = _from_json(value)
            if not isinstance(value, Mapping) or part not in value:
                if missing is not None:
                    return missing
                fields = ", ".join(map(str, row))
                raise UserError(
                    f"{where} has no field {match[1]}", found=fields, fix="correct the template in the task"
                )
            value = value[part]
        if isinstance(value, list):
            return "\n".join(map(str, value))
        return "" if value is None else str(value)

    return _PLACE.sub(place, template)


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _shown(task: Task) -> list[tuple[str, Row]]:
    recipe, examples = task.recipe, task.recipe.examples
    if examples.rows:
        return [(f"example {number} of the task {task.name}", row) for number, row in enumerate(examples.rows, 1)]
    found: list[tuple[str, Row]] = []
    if examples.count:
        rows = _rows(examples.path or recipe.dataset.path, recipe, examples.split or recipe.dataset.split)
        found = [pair for pair, _ in zip(rows, range(examples.count), strict=False)]
    return found


def _rows(path: str, recipe: TaskRecipe, split: str) -> Iterator[tuple[str, Row]]:
    dataset = DatasetRecipe(path=path, name=recipe.dataset.name, split=split, revision=recipe.dataset.revision)
    try:
        opened = open_dataset(dataset)
    except UserError as error:
        fix = "correct `dataset:` in the task, or give its rows: NAME=FILE"
        raise UserError(error.what, found=error.found, expected=error.expected, fix=fix) from error
    for raw in opened.rows():
        yield raw.where, _row(raw)


def _row(raw: RawRow) -> Row:
    if isinstance(raw.value, dict):
        return raw.value
    if raw.too_long is not None:
        raise UserError(f"{raw.where} is absurdly long", found=f"{raw.too_long:,} bytes", fix="correct the line")
    try:
        row = json.loads(raw.value) if raw.is_json else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{raw.where} is not JSON", found=error, expected=_ROW, fix="correct the line") from error
    if not isinstance(row, dict):
        raise UserError(f"{raw.where} is no row of a task", expected=_ROW, fix="correct the line")
    return row


def _target(recipe: TaskRecipe, row: Row, where: str) -> str:
    check = recipe.check
    assert check.target is not None, "the recipe's checks let no such task without a target pass"
    text = fill(check.target, row, where)
    if check.target_pattern is None:
        return text
    found = re.findall(check.target_pattern, text)
    if not found:
        raise UserError(
            f"{where} has no right answer",
            found=text[-100:],
            expected=f"text in which {check.target_pattern} is found",
            fix="correct target_pattern in the task",
        )
    return str(found[-1])


def _messages(recipe: TaskRecipe, shown: list[tuple[str, str]], asked: str) -> Iterator[dict[str, str]]:
    if recipe.system:
        yield {"role": "system", "content": recipe.system}
    for question, answer in shown:
        yield {"role": "user", "content": question}
        yield {"role": "assistant", "content": answer}
    yield {"role": "user", "content": asked}


def _cases(row: Row, field: str, where: str) -> list[tuple[str, str]]:
    value = row.get(field)
    listed = value if isinstance(value, list) else _from_json(value) if isinstance(value, str) else None
    if listed is None and isinstance(value, str):
        listed = _packed(value)
    try:
        return [(str(case["input"]), str(case["output"])) for case in listed or ()]
    except (TypeError, KeyError):
        raise UserError(
            f"{where} has no cases under {field}",
            found=str(value)[:60],
            expected="a list of {input, output}",
            fix="correct the row, or `check:` in the task",
        ) from None


def _packed(text: str) -> Any:
    """JSON in a pickled string, packed by zlib, in base64: how LiveCodeBench hides its tests from crawlers.

    Nothing is unpickled: the string is taken from where the pickle has it.
    """
    try:
        pickled = zlib.decompressobj().decompress(base64.b64decode(text), _MOST_UNPACKED)  # cut off, it has no end
        first = itertools.islice(pickletools.genops(pickled), _MOST_OPERATIONS)
        operations = [(operation.name, value) for operation, value, _ in first]
    except (ValueError, zlib.error):
        return None
    strings = [value for name, value in operations if name in _STRING_OPERATIONS]
    names = {name for name, _ in operations} - {*_STRING_OPERATIONS, *_EMPTY_OPERATIONS}
    whole = operations[-1][0] == "STOP"
    return _from_json(str(strings[0])) if whole and len(strings) == 1 and not names else None
