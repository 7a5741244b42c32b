"""Edits JSON as text: members are replaced, appended or removed, and every other byte stays as it was.

Re-serialising a `config.json` through a library rewrites keys that older readers know under other names, so a
checkpoint's JSON is patched, never saved anew.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert.checkpoint.small_files import read_small
from zconvert.errors import UserError

_DECODER = json.JSONDecoder()
_AGAIN = "download or copy the file again"
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class _Item:
    """One member of an object, or one element of a list, by its place in the text."""

    key: str | None
    start: int
    """of the key; of the value in a list"""
    value_start: int
    end: int


def read_json_text(path: Path, shorten: Callable[[bytes], bytes] = lambda content: content) -> str:
    """The text of a JSON file, line ends as they are.

    Args:
        path: of the file, in a checkpoint's folder.
        shorten: takes out what nobody asks for, before the rest becomes text.

    Raises:
        UserError: the file cannot be read (see `read_small`), or is not UTF-8.
    """
    try:
        return shorten(read_small(path)).decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read", found=error.strerror, fix="check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a JSON file", found=str(error), expected="UTF-8 text", fix=_AGAIN) from error


def parse_json_object(text: str, name: str = "JSON") -> dict[str, Any]:
    """Parses a JSON document whose top level is an object.

    Raises:
        UserError: the text is malformed, or is something other than an object.
    """
    try:
        with _collector_paused():
            document = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise UserError(f"{name} is malformed", found=str(error), expected="a JSON object", fix=_AGAIN) from error
    if not isinstance(document, dict):
        raise UserError(f"{name} is malformed", found=type(document).__name__, expected="a JSON object", fix=_AGAIN)
    return document


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; an empty one where there is no such file.

    Raises:
        UserError: the file cannot be read, or is malformed.
    """
    return parse_json_object(read_json_text(path), str(path)) if path.exists() else {}


def read_named_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file that the user named, which, unlike a checkpoint's own, may be a link to anywhere.

    Raises:
        UserError: the file cannot be read, or is malformed.
    """
    return parse_json_object(read_json_text(Path(os.path.realpath(path))), str(path))


def patch_json(
    text: str,
    changes: Mapping[str, Any],
    *,
    remove: Iterable[str] = (),
    inside: Sequence[str] = (),
    name: str = "JSON",
) -> str:
    """Replaces, appends and removes members of an object, leaving every other byte as it was.

    Args:
        text: a JSON document whose top level is an object.
        changes: member -> new value. Present members are replaced where they stand, new ones go to the end, in the
            indentation of those before them.
        remove: members to take out; absent ones are passed over.
        inside: keys that lead from the top level to the object to edit; missing objects on the way are made.
        name: the document's name, for messages.

    Returns:
        The new text.

    Raises:
        UserError: the text is malformed, or `inside` leads to something other than an object.

    >>> patch_json('{"a": 1, "b": [1,2]}', {"a": 5, "c": None})
    '{"a": 5, "b": [1,2], "c": null}'
    >>> patch_json('{"a": {"x": 1}}', {"y": 2}, inside=["a"])
    '{"a": {"x": 1, "y": 2}}'
    """
    document = parse_json_object(text, name)
    start = _skip(text, 0)
    for depth, key in enumerate(inside):
        item = _find(text, start, key)
        if item is None:  # what is missing from here on becomes one new member
            missing: Any = dict(changes)
            for outer in reversed(inside[depth + 1 :]):
                missing = {outer: missing}
            return patch_json(text, {key: missing}, inside=inside[:depth], name=name)
        start = item.value_start
        if text[start] != "{":
            path = ".".join(inside[: depth + 1])
            found = text[start : start + 40]
            raise UserError(f"{name} is not as expected: {path} is no object", found=found, fix=_AGAIN)
    unit = _indent_unit(text)
    for key in remove:
        while (item := _find(text, start, key)) is not None and key not in changes:
            text = _without(text, start, item)
    for key, value in changes.items():
        item = _find(text, start, key)
        if item is None:
            text = _append(text, start, json.dumps(key) + (":" if _compact(text) else ": "), value, unit)
        else:
            new = _dump(text, value, _line_indent(text, item.start), unit)
            text = text[: item.value_start] + new + text[item.end :]
    _verify(text, document, changes, set(remove), inside, name)
    return text


def append_to_list(text: str, key: str, item: Any, *, name: str = "JSON") -> str:
    """Appends an element to the list under a top-level key; the list is made where it is missing.

    Raises:
        UserError: the text is malformed, or the member is something other than a list.

    >>> append_to_list('{"ids": [1, 2]}', "ids", 3)
    '{"ids": [1, 2, 3]}'
    """
    document = parse_json_object(text, name)
    member = _find(text, _skip(text, 0), key)
    if member is None:
        return patch_json(text, {key: [item]}, name=name)
    if text[member.value_start] != "[":
        found = text[member.value_start :][:40]
        raise UserError(f"{name} is not as expected: {key} is no list", found=found, fix=_AGAIN)
    new = _append(text, member.value_start, "", item, _indent_unit(text))
    _verify(new, document, {key: [*document[key], item]}, set(), (), name)
    return new


def _skip(text: str, at: int) -> int:
    """The first place at or after `at` that is no white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """The collector of cyclic garbage walks over all that was parsed so far, again and again.

    With it a tokenizer of 35 MB takes nearly twice as long.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_collector_paused()
def _items(text: str, start: int) -> list[_Item]:
    """Members of the object, or elements of the list, that opens at `start`."""
    keyed, at, items = text[start] == "{", _skip(text, start + 1), []
    while text[at] not in "}]":
        item_start, key = at, None
        if keyed:
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # over the colon
        _, end = _DECODER.raw_decode(text, at)
        items.append(_Item(key, item_start, at, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return items


def _find(text: str, start: int, key: str) -> _Item | None:
    """The member of that name; of repeated ones the last, which is the one that parsers keep."""
    found = [item for item in _items(text, start) if item.key == key]
    return found[-1] if found else None


def _line_indent(text: str, at: int) -> str | None:
    """The white space before `at` on its line, or None where the line holds something else before it."""
    before = text[text.rfind("\n", 0, at) + 1 : at]
    return before if not before.strip(" \t") and "\n" in text[:at] else None


def _indent_unit(text: str) -> str | None:
    """One level of indentation of the document, None where it stands on one line."""
    members = _items(text, _skip(text, 0))
    return _line_indent(text, members[0].start) if members else "  "


def _compact(text: str) -> bool:
    """Whether members follow each other as `"a":1,"b":2`, without spaces."""
    members = _items(text, _skip(text, 0))
    return bool(members) and text[members[0].value_start - 1] == ":"


def _dump(text: str, value: Any, indent: str | None, unit: str | None) -> str:
    """A value as text in the document's style; `indent` is that of the line it begins on."""
    if unit is None or indent is None:
        return json.dumps(value, separators=(",", ":") if _compact(text) else None)
    newline = "\r\n" if "\r\n" in text else "\n"
    return json.dumps(value, indent=unit).replace("\n", newline + indent)


def _append(text: str, start: int, prefix: str, value: Any, unit: str | None) -> str:
    """Puts `prefix` and the value at the end of the object or list that opens at `start`."""
    items = _items(text, start)
    if items:
        last, first = items[-1], items[0]
        indent = _line_indent(text, last.start)
        gap = text[start + 1 : first.start] if len(items) == 1 else None
        if gap is None:  # what stands between the last two: the comma and the white space after it
            gap = text[text.index(",", items[-2].end) + 1 : last.start]
        elif indent is None and not _compact(text):
            gap = " "
        return text[: last.end] + "," + gap + prefix + _dump(text, value, indent, unit) + text[last.end :]
    close = _skip(text, start + 1)
    if unit is None:
        return text[: start + 1] + prefix + _dump(text, value, None, None) + text[close:]
    line = text[text.rfind("\n", 0, start) + 1 : start]
    outer = line[: len(line) - len(line.lstrip(" \t"))]
    newline = "\r\n" if "\r\n" in text else "\n"
    inner = newline + outer + unit
    return text[: start + 1] + inner + prefix + _dump(text, value, outer + unit, unit) + newline + outer + text[close:]


def _without(text: str, start: int, item: _Item) -> str:
    """Takes a member out together with one comma."""
    items = _items(text, start)
    place = items.index(item)
    if place > 0:
        return text[: items[place - 1].end] + text[item.end :]
    following = items[1].start if len(items) > 1 else item.end
    return text[: item.start] + text[following:]


def _verify(
    text: str, document: dict[str, Any], changes: Mapping[str, Any], removed: set[str], inside: Sequence[str], name: str
) -> None:
    """The patched text must parse to what was asked for."""
    before, after = document, parse_json_object(text, name)
    for key in inside:
        before, after = before[key], after[key]
    expected = {key for key in before if key not in removed} | set(changes)
    # through JSON: tuples become lists, and integer keys strings
    if set(after) != expected or any(after[k] != json.loads(json.dumps(v)) for k, v in changes.items()):
        raise ValueError(f"{name}: the patch did not take; this is a fault of zconvert's")
