"""Recipe files: read, checked whole with every problem in one error, and written."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from zconvert.errors import UserError
from zconvert.recipe.convert_init import ConvertInitRecipe
from zconvert.recipe.extend_context import ExtendContextRecipe
from zconvert.recipe.pipeline import PipelineRecipe
from zconvert.recipe.sections import Recipe, RecipeFile, Section
from zconvert.recipe.training import MidtrainRecipe, SftRecipe
from zconvert.recipe.yaml_text import KeyPath, Problem, dotted, read_yaml, write_yaml

_MAX_RECIPE_BYTES = 100_000
_MOST_TOLD = 30
"""problems of a file; each unknown key is compared with all known ones, which takes a while"""
_MOST_SHOWN = 200
"""characters of a name or value"""
_RECIPES: tuple[type[Recipe], ...] = (ConvertInitRecipe, MidtrainRecipe, ExtendContextRecipe, SftRecipe)
BY_STAGE = {kind.stage: kind for kind in _RECIPES}
"""command -> its recipe"""

RecipeT = TypeVar("RecipeT", bound=RecipeFile)
SectionT = TypeVar("SectionT", bound=Section)


def load_recipe(path: Path, model_class: type[RecipeT]) -> RecipeT:
    """Reads and checks a recipe file; nothing else is touched.

    Args:
        path: YAML file.
        model_class: the stage's recipe, such as `MidtrainRecipe`.

    Raises:
        UserError: the file cannot be read, or its contents are wrong; all unknown keys and bad values in one error.
    """
    try:
        return _load(path, model_class)
    except UserError as error:
        foreign = "is not a known key" in (error.found or "")
        others: tuple[type[RecipeFile], ...] = (PipelineRecipe, *reversed(_RECIPES))  # later ones ask for more
        for other in others if foreign else ():
            if other is not model_class and _is_valid(path, other):
                command = "run" if other is PipelineRecipe else other.stage
                raise UserError(
                    f"{path} is a {other.stage} recipe, not a {model_class.stage} recipe",
                    fix=f"zconvert {command} {path}, or give another file",
                ) from None
        raise


def _load(path: Path, model_class: type[RecipeT]) -> RecipeT:
    kind, example = f"{model_class.stage} recipe", "`zconvert recipes copy` gives a commented example of each stage"
    return load_checked(path, model_class, kind=kind, example=example, stage=model_class.stage)


def _is_valid(path: Path, model_class: type[RecipeFile]) -> bool:
    try:
        _load(path, model_class)
    except UserError:
        return False
    return True


def load_stages(path: Path) -> list[Recipe]:
    """Reads a recipe of any stage, or all recipes of a pipeline.

    Returns:
        the recipes in order; one of the last kind that takes the file as it is, as later ones ask for more.

    Raises:
        UserError: none does; the problems told are those with the kind that has fewest.
    """
    refusals = []
    for kind in reversed(_RECIPES):
        try:
            return [_load(path, kind)]
        except UserError as error:
            refusals.append(error)
    try:
        _load(path, PipelineRecipe)
    except UserError as error:
        refusals.append(error)
        raise min(refusals, key=lambda error: (error.found or "").count("\n")) from None
    return [recipe for _, recipe in load_pipeline(path)]


def load_checked(
    path: Path, model_class: type[SectionT], *, kind: str, example: str, stage: str | None = None
) -> SectionT:
    """Reads a YAML file into a section of its own.

    Args:
        path: YAML file.
        model_class: its contents.
        kind: what to call the file in messages.
        example: where to find such a file that is right.
        stage: whose recipe is meant, where the file has those of several, as an export writes it.

    Raises:
        UserError: the file cannot be read, or its contents are wrong; all unknown keys and bad values in one error.
    """
    values, lines, problems = _read_file(path, kind if stage is None else "recipe", example)
    if list(values) == ["stages"] and stage is not None:
        values, lines = _of_stage(path, values["stages"], lines, stage)
    checked: SectionT | None = None
    try:
        checked = model_class.model_validate(values)
    except ValidationError as error:
        problems += islice(_problems(error, model_class, lines), _MOST_TOLD + 1)
    if problems or checked is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        if len(problems) > _MOST_TOLD:
            problems, count = problems[:_MOST_TOLD], f"more than {_MOST_TOLD} problems"
        raise UserError(
            f"{path} is not a valid {kind}: {count}",
            found="\n".join(f"- {problem.sentence}" for problem in sorted(problems, key=lambda problem: problem.line)),
            fix=f"correct these; {example}",
        )
    return checked


def _of_stage(
    path: Path, entries: Any, lines: dict[KeyPath, int], stage: str
) -> tuple[dict[Any, Any], dict[KeyPath, int]]:
    """The last recipe of a stage among those of all, `{stage, recipe}` each, and its lines."""
    for number, entry in reversed(list(enumerate(entries if isinstance(entries, list) else []))):
        if isinstance(entry, dict) and entry.get("stage") == stage and isinstance(entry.get("recipe"), dict):
            here: KeyPath = ("stages", number, "recipe")
            return entry["recipe"], {key[len(here) :]: line for key, line in lines.items() if key[: len(here)] == here}
    raise UserError(f"{path} has no recipe of {stage}", found="stages: of others", fix="give another file")


def load_pipeline(path: Path) -> list[tuple[Path, Recipe]]:
    """Reads a pipeline's file and the recipes that it names.

    Args:
        path: YAML file; the recipes' paths are relative to its folder.

    Returns:
        file and recipe of each stage, in order.

    Raises:
        UserError: a file is wrong, or a stage does not start from what the one before it writes.
    """
    pipeline = load_recipe(path, PipelineRecipe)
    stages: list[tuple[Path, Recipe]] = []
    for stage, name in pipeline.files().items():
        file = path.parent / name
        stages.append((file, load_recipe(file, BY_STAGE[stage])))
    for (_, before), (file, after) in pairwise(stages):
        if Path(after.base_model).expanduser() != Path(before.output_dir).expanduser():
            raise UserError(
                f"the stages of {path} do not go together: {file.name} does not start from what {before.stage} writes",
                found=f"base_model: {after.base_model}",
                expected=f"base_model: {before.output_dir}",
                fix=f"correct base_model in {file}, or output_dir before it",
            )
    return stages


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with every setting written out; `load_recipe` reads an equal recipe back."""
    return write_yaml(recipe.model_dump(mode="json"))


def _read_file(path: Path, kind: str, example: str) -> tuple[dict[Any, Any], dict[KeyPath, int], list[Problem]]:
    try:
        size = path.stat().st_size
        if path.is_dir() or size > _MAX_RECIPE_BYTES:
            raise UserError(
                f"{path} is not a {kind}",
                found="a folder" if path.is_dir() else f"a file of {size:,} bytes",
                expected=f"a YAML file of at most {_MAX_RECIPE_BYTES:,} bytes",
                fix=f"check the path; {example}",
            )
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"there is no {kind} {path}", fix=f"check the path; {example}") from None
    except OSError as error:
        fix = "check the path and its permissions"
        raise UserError(f"{kind} {path} cannot be read", found=error.strerror, fix=fix) from None
    except UnicodeDecodeError:
        found, fix = "bytes that are not UTF-8", "save it as UTF-8 text"
        raise UserError(f"{path} is not a {kind}", found=found, expected="a YAML file", fix=fix) from None
    except ValueError as error:
        raise UserError(
            f"{path} is not a {kind}",
            found=error,
            expected="one YAML mapping of `key: value` lines",
            fix=f"correct the line; {example}",
        ) from None


def _problems(error: ValidationError, model: type[Section], lines: dict[KeyPath, int]) -> Iterator[Problem]:
    """One sentence for each item that pydantic found wrong, by line; a value with several faults is named once."""
    found: dict[KeyPath, Any] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_key_path(item["loc"], lines, missing=item["type"] == "missing"), item)
    for path, item in sorted(found.items(), key=lambda place: lines.get(place[0], 0)):
        line = lines.get(path, 0)
        name = _short(dotted(path)) + (f" (line {line})" if line else "")
        if item["type"] == "extra_forbidden":
            yield Problem(line, f"{name} is not a known key{_suggestion(path, model, lines)}")
        elif item["type"] == "missing":
            yield Problem(line, f"{name} is missing{_described(path, model)}")
        else:
            reason = str(item["ctx"]["error"]) if item["type"] == "value_error" else _expected(item, path)
            missing = item["input"] is None and path != tuple(item["loc"])  # a key that is not there has no value
            stands = f" is {_as_written(item['input'])}" if line and not missing else ""
            yield Problem(line, f"{name}{stands}: {reason}")


def _as_written(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _key_path(loc: tuple[str | int, ...], lines: dict[KeyPath, int], *, missing: bool) -> KeyPath:
    """The key that an error is about: pydantic adds names of union members behind it, and names aliases' fields."""
    path = tuple(loc)
    if missing:
        return path
    while len(path) > 1 and path not in lines and path[:-1] in lines:
        path = path[:-1]
    return path


def _expected(item: Any, path: KeyPath) -> str:
    """What was expected there, in words (pydantic's own say "Input should be …")."""
    words = {
        "string_pattern_mismatch": "expected mean, zero, random or copy:<token>",
        "string_type": "expected text; put it in quotes if it is meant so",
        "string_too_short": "expected text",
        "int_type": "expected a whole number",
        "float_type": "expected a number",
        "bool_type": "expected true or false",
        "finite_number": "expected a finite number",
        "model_type": "expected a section of `key: value` lines",
        "list_type": "expected a list",
        "too_short": "expected at least one entry",
    }
    if path[-1] == "mask_token":
        return "expected the token's text or its id"
    message = str(item["msg"])
    return words.get(item["type"], message.replace("Input should be", "expected", 1))


def _suggestion(path: KeyPath, model: type[Section], lines: dict[KeyPath, int]) -> str:
    name = str(path[-1])
    if name == "block_length" and (*path[:-1], "block_size") in lines:
        return " beside block_size, which says the same: keep block_size"
    section = _section(model, path[:-1])
    known = list(section.model_fields) if section else []
    near = difflib.get_close_matches(name[:_MOST_SHOWN], known, n=1)
    if near:
        return f", did you mean {near[0]}?"
    places = [dotted(place) for place in _all_keys(model) if place[-1] == name]
    if places:
        return f" here, it belongs at {places[0]}"
    stages = [other.stage for other in _RECIPES if any(place[-1] == name for place in _all_keys(other))]
    if stages:
        return f" here, it belongs to a {stages[0]} recipe"
    near = difflib.get_close_matches(name[:_MOST_SHOWN], [str(place[-1]) for place in _all_keys(model)], n=1)
    return f", did you mean {near[0]}?" if near else ""


def _described(path: KeyPath, model: type[Section]) -> str:
    section = _section(model, path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    return f" ({field.description})" if field else ""


def _section(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model class of the section at `path`, through lists."""
    for part in path:
        if isinstance(part, str):
            inner = _model_in(model.model_fields[part].annotation) if part in model.model_fields else None
            if inner is None:
                return None
            model = inner
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _all_keys(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, (*prefix, name))
