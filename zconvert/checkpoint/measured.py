"""What a model card says was measured: decoding speed (`zconvert bench`) and tasks (`zconvert evaluate`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zconvert.errors import UserError

_SPEED = (
    ("tokens_per_forward", "tokens per forward", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("speedup", "ratio to AR", "{:.2f}×"),
)
_CONDITIONS = ("device", "device_name", "threads", "dtype", "batch_size", "prompts", "n", "temperature")
_PASS = "pass@"
_MISSING = "not measured"
_MOST = 1e15
"""more is no figure, nor is NaN"""
_LONGEST = 200
"""characters of a name"""


def measured_section(results: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> str:
    """The section of the card; it says so where nothing was measured.

    Args:
        results: what `zconvert bench --json` printed.
        evaluation: what `zconvert evaluate` wrote into `results.json`.

    Raises:
        UserError: the results are not those of a bench run.
    """
    tables = _tasks(evaluation or {})
    quality = "\n\n".join(tables) or "Quality was not measured for this card; `zconvert evaluate` measures it."
    if results is None and not tables:
        return (
            "Nothing was measured for this card: neither speed nor quality. `zconvert bench` measures speed, "
            "`zconvert evaluate` quality."
        )
    speed = "Decoding speed was not measured for this card by itself." if results is None else _speed(results)
    last = "What is not listed here was not measured; ratios hold for this device, batch and text only."
    return "\n\n".join([speed, quality, last])


def _speed(results: Mapping[str, Any]) -> str:
    entries = _by_name(results.get("results", results))
    rows = {k: v for k, v in entries.items() if isinstance(v, Mapping) and _number(v, "tokens_per_second")}
    if not rows:
        raise UserError(
            "the results are not those of a bench run",
            found=f"keys {', '.join(map(str, entries)) or 'none'}",
            expected="what `zconvert bench --json` prints, with tokens_per_second for each sampler",
            fix="zconvert bench CHECKPOINT --json > bench.json",
        )
    lines = _head("sampler", [title for _, title, _ in _SPEED])
    lines += [_row(name, [_cell(entry, key, form) for key, _, form in _SPEED]) for name, entry in rows.items()]
    for name, text in (("source", "the source answered"), ("converted", "the converted model's AR path answered")):
        accuracy = entries.get(name)
        if isinstance(accuracy, Mapping) and _number(accuracy, "accuracy"):
            lines.append(f"\nAccuracy: {text} {accuracy['accuracy']:.1%}.")
    facts = _facts(results) | {key: entries[key] for key in ("prompts",) if isinstance(entries.get(key), int)}
    return "\n".join([*lines, *_measured_with(facts)])


def _by_name(entries: Any) -> Mapping[str, Any]:
    """The entries of a bench document, which are a list, by what they are called; or those that have names already."""
    if isinstance(entries, list):
        entries = {_called(entry): entry for entry in entries if isinstance(entry, Mapping)}
    return entries if isinstance(entries, Mapping) else {}


def _called(entry: Mapping[str, Any]) -> str:
    batch, tokens = entry.get("batch_size", 1), entry.get("prompt_tokens")
    return f"{entry.get('name')}" + (f", batch {batch}" if batch != 1 else "") + (f", after {tokens}" if tokens else "")


def _tasks(evaluation: Mapping[str, Any]) -> list[str]:
    """A table for each task: a line a sampler, with what is there of pass@k and speed."""
    tables = []
    for task, entry in _mappings(evaluation.get("tasks")):
        columns = dict(_mappings(entry.get("columns")))
        shares = sorted({key for column in columns.values() for key in column if _is_share(column, key)}, key=_k)
        if not shares:
            continue
        decoding = [one for one in _SPEED if any(_number(column, one[0]) for column in columns.values())]
        lines = [f"**{task}**\n", *_head("sampler", [*shares, *(title for _, title, _ in decoding)])]
        for name, column in columns.items():
            cells = [_share(column, share) for share in shares]
            lines.append(_row(name, cells + [_cell(column, key, form) for key, _, form in decoding]))
        tables.append("\n".join(lines))
    facts = _facts(evaluation)
    if tables and facts:
        tables.append("".join(_measured_with(facts)).strip())
    return tables


def _mappings(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The members that are mappings, of what may be anything."""
    for name, member in value.items() if isinstance(value, Mapping) else ():
        if isinstance(member, Mapping):
            yield str(name), member


def _is_share(column: Mapping[str, Any], key: str) -> bool:
    return key.startswith(_PASS) and len(key) < _LONGEST and key[len(_PASS) :].isdecimal() and _number(column, key)


def _k(key: str) -> int:
    return int(key[len(_PASS) :])


def _share(column: Mapping[str, Any], key: str) -> str:
    """As `82.5% (80.1 to 84.9)`, with the interval where there is one."""
    if not _number(column, key):
        return _MISSING
    intervals = column.get("interval")
    interval = intervals.get(key) if isinstance(intervals, Mapping) else None
    text = f"{column[key]:.1%}"
    if isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)):
        text += f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return text


def _cell(entry: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(entry[key]) if _number(entry, key) else _MISSING


def _head(first: str, titles: list[str]) -> list[str]:
    return [_row(first, titles), "|---|" + "---:|" * len(titles)]


def _row(first: object, cells: list[str]) -> str:
    return f"| {_plain(first)} | " + " | ".join(cells) + " |"


def _facts(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in _CONDITIONS if isinstance(document.get(key), str | int | float)}


def _measured_with(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    return [
        "\nMeasured with " + ", ".join(_plain(f"{key} {value}".replace("_", " ")) for key, value in facts.items()) + "."
    ]


def _plain(text: object) -> str:
    """On one line and in one cell, whatever a file says."""
    return " ".join(str(text)[:_LONGEST].split()).replace("|", "\\|")


def _number(entry: Mapping[str, Any], key: str) -> bool:
    return _is_number(entry.get(key))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST
