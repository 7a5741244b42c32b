"""Changes documents where they are read as such: random bytes seldom are JSON, and so reach little of the code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308),
    *(float("inf"), float("nan"), "", " ", "a", ".", "..", "/", "../a.safetensors", "/etc/passwd", "a.safetensors"),
    *(
        "\x1b[2J",
        "\0",
        "\ud800",
        "[red]",
        "%s{0}",
        "auto",
        "null",
        "1",
        "1e-5",
        "x" * 3000,
        [],
        {},
        [[]],
        [0, 1],
        [1, 0],
    ),
    *([None], ["a", 1], {"": 0}, {"a": {"b": []}}, [[[[[[[[]]]]]]]]),
)
"""values that programs stumble over"""
_MOST_STEPS = 4

Parse = Callable[[str], Any]
Write = Callable[[Any], str]


def mutate(
    data: bytes, random: Random, *, prefix: int = 0, parse: Parse = json.loads, write: Write = json.dumps
) -> bytes:
    """The document with a few of its values changed, moved, repeated or taken out.

    Args:
        data: the document, behind `prefix` bytes that stay. What is no document comes back as it is.
        random: chooses.
        prefix: bytes before the document.
        parse: reads it.
        write: writes it.
    """
    head, text, tail = data[:prefix], data[prefix:].decode("utf-8", errors="replace"), ""
    if prefix and "\0" in text:  # the bytes of tensors, behind a header
        text, _, tail = text.partition("\0")
        tail = "\0" + tail
    try:
        document = parse(text)
    except (ValueError, RecursionError):
        return data
    for _ in range(random.randint(1, _MOST_STEPS)):
        document = _step(document, random)
    return head + write(document).encode("utf-8", errors="replace") + tail.encode("utf-8", errors="replace")


def _step(document: Any, random: Random) -> Any:
    """One change, somewhere in the document."""
    places = list(_places(document))
    if not places or random.random() < 0.02:
        return _odd(random)
    holder, key = random.choice(places)
    how = random.random()
    if how < 0.5:
        holder[key] = _odd(random)
    elif how < 0.65:
        other, name = random.choice(places)
        holder[key] = copy.deepcopy(other[name])  # no document holds itself
    elif how < 0.8:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, _odd(random))
    else:
        _, name = random.choice(places)
        holder[name if isinstance(name, str) else str(_odd(random))] = copy.deepcopy(holder[key])
    return document


def _odd(random: Random) -> Any:
    return copy.deepcopy(random.choice(ODD))


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(object or list, key or number) of each value in the document."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, dict | list):
            members = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
            found += [(holder, key) for key, _ in members]
            waiting += [value for _, value in members]
    return found
