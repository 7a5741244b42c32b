"""The speeds of a bench document as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zconvert.errors import UserError


def draw(document: dict[str, Any], path: Path) -> None:
    """Draws the speeds of a bench document, against AR, into a PNG file.

    Raises:
        UserError: no matplotlib, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib", found=error, fix="pip install 'zconvert[report]'") from error
    entries = [entry for entry in document["results"] if "speedup" in entry]
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    places = list(dict.fromkeys(map(_place, entries)))
    figure = Figure(figsize=(2 + 1.6 * max(2, len(places)) + 0.3 * len(names), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        at = {
            (e["batch_size"], e["max_new_tokens"], e["prompt_tokens"]): e["speedup"]
            for e in entries
            if e["name"] == name
        }
        where = [place + width * index for place, key in enumerate(places) if key in at]
        axes.bar(where, [at[key] for key in places if key in at], width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    labels = [f"batch {b}\n{n} new tokens" + (f"\nafter {p}" if p else "") for b, n, p in places]
    axes.set_xticks([place + width * (len(names) - 1) / 2 for place in range(len(places))], labels)
    axes.set_ylabel("tokens/s against plain AR")
    axes.set_title(f"{document['checkpoint']}, {document['dtype']} on {document['device']}")
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        fix = "check the folder and the name, which ends in .png"
        raise UserError(f"{path} cannot be written", found=error, expected="a PNG file's path", fix=fix) from error


def _place(entry: dict[str, Any]) -> tuple[int, int, int | None]:
    return entry["batch_size"], entry["max_new_tokens"], entry["prompt_tokens"]
