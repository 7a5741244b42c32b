"""Writes what the documentation takes from the code, so that the two cannot part.

    python docs/generate.py            # the parts of docs/*.md between `<!-- generated: … -->` marks, and the drawings
    python docs/generate.py --check    # exit code 1 where they are not up to date

tests/docs/test_pages.py runs the check.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from zconvert.recipe import ConvertInitRecipe, ExtendContextRecipe, PipelineRecipe, SftRecipe, TaskRecipe
from zconvert.recipe.sections import Recipe, Section
from zconvert.recipe.training import TrainingRecipe
from zconvert.tidar.families import COMPOSITES, FAMILIES, REFUSED, Family
from zconvert.tidar.layout import Layout, decode_layout, packed_layout, with_committed
from zconvert.tidar.masks import visible

DOCS = Path(__file__).resolve().parent

# Recipes


def recipe_tables() -> str:
    """Every key of every recipe, by stage."""
    common = set(Recipe.model_fields)
    training = set(TrainingRecipe.model_fields)
    parts = [
        "## Every stage\n\n" + _table(Recipe),
        "## convert-init\n\n" + "\n\n".join(_sections(ConvertInitRecipe, without=common)),
        "## midtrain, extend-context, sft\n\n" + "\n\n".join(_sections(TrainingRecipe, without=common)),
        "## extend-context alone\n\n" + "\n\n".join(_sections(ExtendContextRecipe, without=training)),
    ]
    assert set(SftRecipe.model_fields) == training, "sft has keys of its own: they want a table"
    parts.append("## A pipeline\n\n" + "\n\n".join(_sections(PipelineRecipe, without=set())))
    parts.append("## A task of evaluate\n\n" + "\n\n".join(_sections(TaskRecipe, without=set())))
    return "\n\n".join(parts)


def _sections(
    model: type[Section], *, without: set[str], prefix: str = "", told: dict[type[Section], str] | None = None
) -> Iterator[str]:
    """The table of a section, then those of the sections in it, headed by their own keys; of equal ones the first."""
    told = {} if told is None else told
    table = _table(model, prefix, without)
    if table:
        yield table
    for name, field in model.model_fields.items():
        inner, is_list = _section_in(field.annotation)
        if inner is None or name in without:
            continue
        path = f"{prefix}{field.alias or name}{'[]' * is_list}"
        needed = ", needed" if field.is_required() else ""
        head = (
            f"### `{path}`\n\n{'A list of sections' if is_list else 'A section'}{needed}: {_cell(field.description)}."
        )
        if inner in told:
            yield f"{head} Its keys are those of `{told[inner]}`."
            continue
        told[inner] = path
        first, *rest = _sections(inner, without=set(), prefix=f"{path}.", told=told)
        yield f"{head}\n\n{first}"
        yield from rest


def _table(model: type[Section], prefix: str = "", without: set[str] | None = None) -> str:
    rows = [
        f"| `{prefix}{field.alias or name}` | {_value_of(field)} | {_default(field)} | {_cell(field.description)} |"
        for name, field in model.model_fields.items()
        if name not in (without or ()) and _section_in(field.annotation)[0] is None
    ]
    return "\n".join(["| key | value | default | what it does |", "|---|---|---|---|", *rows]) if rows else ""


def _cell(text: str | None) -> str:
    assert text, "a key without a description"
    return text.replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    default = None if field.default is PydanticUndefined else field.default
    if isinstance(default, bool) or default is None:
        return {True: "`true`", False: "`false`", None: "`null`"}[default]
    if default == "":
        return '`""`'
    return f"`{_text(default)}`"


def _text(default: Any) -> str:
    return repr(default).replace("'", "") if not isinstance(default, str) else default.replace("\n", "\\n")


def _section_in(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a value is, or a list of which it is."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    for part in get_args(annotation):
        section, _ = _section_in(part)
        if section is not None:
            return section, get_origin(annotation) is list
    return None, False


def _value_of(field: FieldInfo) -> str:
    return _value(field.annotation, field.metadata)


def _value(annotation: Any, limits: list[Any]) -> str:
    """What a value may be, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = args
        found = [limit for each in more for limit in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return _value(inner, [*found, *limits])
    if origin in (Union, UnionType):
        kinds = [_value(arg, limits) for arg in args if arg is not NoneType]
        return " or ".join([*kinds, *(["`null`"] if NoneType in args else [])])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin is list:
        return f"list of: {_value(args[0], [])}"
    if origin is dict:
        return "mapping"
    return (
        f"{ {int: 'whole number', float: 'number', bool: 'true or false', str: 'text'}[annotation] }{_limits(limits)}"
    )


def _limits(limits: list[Any]) -> str:
    """`≥ 1` and the like, and patterns; that text is not empty goes without saying."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {_number(bound)}" for name, sign in signs.items() for bound in _of(limits, name)]
    found += [f"matching `{pattern}`".replace("|", "\\|") for pattern in _of(limits, "pattern")]
    return f" {', '.join(found)}" if found else ""


def _of(limits: list[Any], name: str) -> list[Any]:
    """The limits of a kind; that of the field itself stands last and counts."""
    return [getattr(limit, name) for limit in limits if getattr(limit, name, None) is not None][-1:]


def _number(bound: float) -> str:
    return "2³²" if bound == 2**32 else f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


# Families


def family_tables() -> str:
    """The table of families, and what is refused."""
    experts = [family for family in FAMILIES.values() if not family.dense]
    dense = [family for family in FAMILIES.values() if family.dense]
    parts = [
        f"## Mixtures of experts: {len(experts)}\n\n" + _families(experts),
        f"## Dense models: {len(dense)}\n\n" + _families(dense),
        "## Models for images and text\n\nThe text model is converted, the rest stays as it is: "
        + ", ".join(f"`{name}`" for name in COMPOSITES)
        + ".",
        "## Refused\n\nA `layer_types` entry of one of these kinds is refused too, whatever the family.\n\n"
        "| `model_type` | why |\n|---|---|\n"
        + "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items())),
    ]
    return "\n\n".join(parts)


def _families(families: list[Family]) -> str:
    masks = {"single": "one", "window": "one, with the sliding window", "layer_type": "one for each type of layer"}
    rows = [
        f"| `{family.model_type}` | {masks[family.masks]} | {'; '.join(_needs(family)) or '–'} |"
        for family in sorted(families, key=lambda family: family.model_type)
    ]
    return "\n".join(["| `model_type` | attention masks | what else it needs |", "|---|---|---|", *rows])


def _needs(family: Family) -> Iterator[str]:
    """What the conversion does for a family beyond handing it masks."""
    if family.mixing != "attention":
        kind = "compressed convolutional attention (CCA)" if family.mixing == "cca" else "short convolutions"
        yield f"predecessors for its {kind}"
    if family.indexed:
        yield "masks that its sparse indexer reads too"
    if family.sinks:
        yield "its attention sinks as one more key, for SDPA"
    if family.positions:
        yield "to be told positions, which it takes from the cache's length"
    if family.head != "plain":
        heads = {"logits_scaling": "divides logits", "logit_scale": "scales logits", "softcap": "caps logits"}
        yield f"a head that {heads.get(family.head, 'scales and cuts logits')}"
    if family.explicit_layers:
        yield "layer types in `config.json` without Mamba layers"


# Drawings of the masks

Drawing = tuple[str, list[str], list[str], list[list[str]]]
"""title, names of the queries, names of the keys, and of each pair: own (block), text or nothing"""
COLOURS = {"clean": "#4477aa", "text": "#aac8e4", "own": "#ee8844"}
CELL, LEFT, TOP = 26, 56, 44


def training_row() -> Drawing:
    """A packed training row of six tokens in blocks of three."""
    row = packed_layout(torch.zeros(1, 6, dtype=torch.long), block_size=3)
    names = [f"x{i}" for i in range(6)] + [f"m{i}" for i in range(6)]
    return "A training row, T = 6, B = 3", names, names, _kinds(row, row)


def decoding_step() -> Drawing:
    """A decoding forward in blocks of three, after four committed tokens, with blocks for 1 and 3 accepted tokens."""
    step = decode_layout(4, 3, (1, 3), 3)
    names = ["r", "d1", "d2", "a0", "a1", "a2", "b0", "b1", "b2"]
    keys = ["c0", "c1", "c2", "c3", *names]
    return "A decoding step, B = 3, proposals 1 and 3", names, keys, _kinds(step, with_committed(step, 4))


def _kinds(query: Layout, key: Layout) -> list[list[str]]:
    seen, slots = visible(query, key)[0], key.is_masked[0]
    query_slots = query.is_masked[0].tolist()
    return [
        [
            ("own" if slot else "text" if query_slot else "clean") if sees else ""
            for sees, slot in zip(row, slots.tolist(), strict=True)
        ]
        for query_slot, row in zip(query_slots, seen.tolist(), strict=True)
    ]


def as_text(drawing: Drawing) -> str:
    """The mask in letters: 1 a clean token sees text, t a slot sees text, o a slot sees its own block."""
    _, rows, keys, kinds = drawing
    marks = {"clean": "1", "text": "t", "own": "o", "": "."}
    first_slot = next(i for i, name in enumerate(keys) if name[0] in "ma")
    lines = ["      " + _spaced(keys, first_slot)]
    lines += [
        f"{name:>4}  {_spaced([marks[kind] for kind in row], first_slot)}"
        for name, row in zip(rows, kinds, strict=True)
    ]
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def _spaced(cells: list[str], first_slot: int) -> str:
    return " ".join(["| " * (i == first_slot) + f"{cell:<2}" for i, cell in enumerate(cells)])


def as_svg(drawing: Drawing) -> str:
    """The mask as a picture: rows are what asks, columns what is seen."""
    title, rows, keys, kinds = drawing
    width, height = max(LEFT + CELL * len(keys) + 16, 430), TOP + CELL * len(rows) + 46
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="monospace" font-size="12" role="img">',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-weight="bold">{title}</text>',
    ]
    for column, name in enumerate(keys):
        lines.append(f'<text x="{LEFT + CELL * column + 13}" y="{TOP - 8}" text-anchor="middle">{name}</text>')
    for line, (name, row) in enumerate(zip(rows, kinds, strict=True)):
        y = TOP + CELL * line
        lines.append(f'<text x="{LEFT - 10}" y="{y + 17}" text-anchor="end">{name}</text>')
        for column, kind in enumerate(row):
            fill = COLOURS.get(kind, "#f4f4f4")
            lines.append(
                f'<rect x="{LEFT + CELL * column}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" fill="{fill}"/>'
            )
    x, y = LEFT, TOP + CELL * len(rows) + 16
    for kind, words in (("clean", "text, causally"), ("text", "text before"), ("own", "own block")):
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        lines.append(f'<text x="{x + 18}" y="{y + 11}">{words}</text>')
        x += 18 + 8 * len(words) + 14
    return "\n".join([*lines, "</svg>", ""])


# Files


def files() -> dict[Path, str]:
    """Every generated file with its contents as they should be; pages keep what is outside their marks."""
    parts = {
        "recipes": recipe_tables,
        "families": family_tables,
        "training mask": lambda: as_text(training_row()),
        "decoding mask": lambda: as_text(decoding_step()),
    }
    found: dict[Path, str] = {
        DOCS / "training-mask.svg": as_svg(training_row()),
        DOCS / "decoding-mask.svg": as_svg(decoding_step()),
    }
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name, make in parts.items():
            mark = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            if mark.search(text):
                made = make()
                text = mark.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)  # type: ignore[misc]
                found[page] = text
    return found


def stale() -> list[Path]:
    """Files that are not as they should be."""
    return [path for path, text in files().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> None:
    """Writes them, or tells which are not up to date."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would change")
    check, made, others = parser.parse_args().check, files(), stale()
    for path in others:
        print(f"{path.name} {'is not up to date' if check else 'written'}")
        if not check:
            path.write_text(made[path], encoding="utf-8")
    sys.exit(check and bool(others))


if __name__ == "__main__":
    main()
