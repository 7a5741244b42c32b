"""`results.json` → pictures, and one HTML page that needs no other file."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zconvert.evaluation.samplers import AR, BASELINE, LOSSLESS, MIX
from zconvert.page import png, write_page

_PANELS_IN_A_ROW = 3
_COLOURS = {BASELINE: "black", AR: "C7", LOSSLESS: "C0"}


def write_report(folder: Path, results: Mapping[str, Any]) -> Path:
    """Draws an evaluation: pass@k of every column by task, and speed against quality.

    Args:
        folder: to write into.
        results: what `write_results` gave.

    Returns:
        the page, with the images beside it and also inside.

    Raises:
        UserError: no matplotlib, or the folder cannot be written.
    """
    panels = len(results["tasks"])
    rows = math.ceil(panels / _PANELS_IN_A_ROW)
    size = (max(6.0, 4.0 * min(panels, _PANELS_IN_A_ROW)), 3.6 * rows)
    drawn = {
        "quality": png(lambda figure: _panels(figure, results, rows, _quality), size),
        "trade": png(lambda figure: _panels(figure, results, rows, _trade), size),
    }
    images = {name: image for name, image in drawn.items() if image is not None}
    title = f"{results['checkpoint']['name']}: pass@k and speed"
    return write_page(folder, title, images, above=_intro(results), below=_tables(results))


def column_label(name: str, results: Mapping[str, Any]) -> str:
    """What a column is called in a report.

    >>> column_label("ar", {"mode": "gated", "baseline": None}), column_label("mix:0.5", {})
    ('AR (the source itself)', 'mixed, w = 0.5')
    """
    if name == BASELINE:
        return f"{results['baseline']['name']} (AR)"
    if name == AR:
        return "AR (the source itself)" if results.get("mode") == "gated" else "AR"
    return f"mixed, w = {name.removeprefix(MIX)}" if name.startswith(MIX) else name


def sentences(results: Mapping[str, Any], task: str) -> list[str]:
    """The verdicts on a task's columns, in words."""
    found = []
    first = f"pass@{results['k'][0]}"
    for name, entry in results["tasks"][task]["columns"].items():
        for other, by_k in entry["difference"].items():
            told = by_k[first]
            low, high = (100 * end for end in told["interval"])
            text = (
                f"{column_label(name, results)} against {column_label(other, results)}: {told['verdict']} "
                f"({first} {100 * told['mean']:+.1f} points, {low:+.1f} to {high:+.1f})"
            )
            if told["problems_needed"] is not None:
                text += f"; about {told['problems_needed']:,} such problems would tell"
            found.append(text)
    return found


def faults(results: Mapping[str, Any], task: str) -> list[str]:
    """What went wrong with the texts of a task's columns, in words; nothing where nothing did."""
    found = []
    for name, entry in results["tasks"][task]["columns"].items():
        shares = (("cut_off", "cut off by the length"), ("without_answer", "no answer found"), ("looping", "looping"))
        told = [f"{entry[key]:.1%} {words}" for key, words in shares if entry[key] >= 0.0005]  # shown as 0.1 %
        if told:
            found.append(f"{column_label(name, results)}: {', '.join(told)}")
    return found


def _panels(figure: Any, results: Mapping[str, Any], rows: int, draw: Any) -> bool:
    tasks = list(results["tasks"])
    across = min(len(tasks), _PANELS_IN_A_ROW)
    panels = figure.subplots(rows, across, squeeze=False)
    for axes, task in zip(panels.flat, tasks, strict=False):
        draw(axes, results, results["tasks"][task]["columns"])
        axes.set_title(task)
        axes.grid(alpha=0.3)
    for axes in list(panels.flat)[len(tasks) :]:
        axes.set_axis_off()
    panels.flat[0].legend(fontsize="small")
    return bool(tasks)


def _quality(axes: Any, results: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    ks = results["k"]
    count = len(columns)
    for number, (name, entry) in enumerate(columns.items()):
        values, below, above = _values(entry, ks)
        shift = 1.06 ** (number - (count - 1) / 2)  # side by side, so that the intervals can be told apart
        style = {"label": column_label(name, results), "color": _colour(name, columns), "capsize": 2}
        axes.errorbar([k * shift for k in ks], values, yerr=(below, above), marker="o", markersize=4, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set(xlabel="k", ylabel="pass@k, %")


def _trade(axes: Any, results: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """Each column where its speed and its quality put it; the mixed ones joined in the order of their weight."""
    k = results["k"][0]
    fastest = columns[AR]["tokens_per_second"] if AR in columns else None
    places: dict[str, tuple[float, float]] = {}
    for name, entry in columns.items():
        (value,), below, above = _values(entry, [k])
        speed = entry["tokens_per_second"] / fastest if fastest else entry["tokens_per_second"]
        places[name] = speed, value
        style = {"label": column_label(name, results), "color": _colour(name, columns), "capsize": 2}
        axes.errorbar([speed], [value], yerr=(below, above), marker="o", **style)
    mixed = sorted((name for name in places if name.startswith(MIX)), key=_weight, reverse=True)
    joined = [name for name in (LOSSLESS, *mixed) if name in places]
    axes.plot(*zip(*(places[name] for name in joined), strict=True), ":", color="grey", zorder=0) if joined else None
    for name in mixed:
        axes.annotate(f"w = {_weight(name):g}", places[name], textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel="speed against AR" if fastest else "tokens/s", ylabel=f"pass@{k}, %")


def _weight(name: str) -> float:
    return float(name.removeprefix(MIX))


def _colour(name: str, columns: Mapping[str, Any]) -> str:
    mixed = [column for column in columns if column.startswith(MIX)]
    return _COLOURS[name] if name in _COLOURS else f"C{1 + mixed.index(name) % 6}"


def _values(entry: Mapping[str, Any], ks: list[int]) -> tuple[list[float], list[float], list[float]]:
    """pass@k in per cent, and how far its interval reaches below and above."""
    values = [100 * entry[f"pass@{k}"] for k in ks]
    ends = [entry["interval"][f"pass@{k}"] for k in ks]
    below = [max(0.0, value - 100 * low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, 100 * high - value) for value, (_, high) in zip(values, ends, strict=True)]
    return values, below, above


def _intro(results: Mapping[str, Any]) -> str:
    reference = results["reference"]
    against = "There is no column to compare with."
    if reference is not None:
        own = " and to the checkpoint's own AR" if reference == BASELINE else ""
        against = f"Differences are to {column_label(reference, results)}{own}, problem by problem."
    samples = "1 sample" if results["n"] == 1 else f"{results['n']} samples"
    text = (
        f"{samples} a problem at temperature {results['temperature']:g}. Intervals are 95 %, over "
        f"problems. {against} Speed: {results['batch_size']} texts at a time, {results['dtype']} on "
        f"{results['device_name']}, CPU threads: {results['threads']}."
    )
    return f"<p>{html.escape(text)}</p>"


def _tables(results: Mapping[str, Any]) -> str:
    parts = []
    for task, told in results["tasks"].items():
        ks = [f"pass@{k}" for k in results["k"]]
        head = ["", *ks, "tokens/forward", "tokens/s", "tokens", "cut off", "no answer", "looping"]
        rows = [
            [
                column_label(name, results),
                *(f"{entry[k]:.1%} ({_range(entry['interval'][k])})" for k in ks),
                f"{entry['tokens_per_forward']:.2f}",
                f"{entry['tokens_per_second']:,.1f}",
                f"{entry['mean_tokens']:,.0f}",
                *(f"{entry[fault]:.1%}" for fault in ("cut_off", "without_answer", "looping")),
            ]
            for name, entry in told["columns"].items()
        ]
        verdicts = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences(results, task))
        parts.append(
            f"<h2>{html.escape(task)}, {told['problems']} problems</h2><table><tr>{_cells('th', head)}</tr>"
            + "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
            + f"</table><ul>{verdicts}</ul>"
        )
    return "".join(parts)


def _range(interval: list[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _cells(tag: str, texts: list[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
