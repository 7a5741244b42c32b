"""The speeds of a bench document as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import own_file, write_file
from zconvert.errors import UserError
from zconvert.page import png


def draw(document: dict[str, Any], path: Path) -> None:
    """Draws the speeds of a bench document, against AR, into a PNG file.

    Raises:
        UserError: no matplotlib, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(
            f"{path} cannot be written",
            found=f"the ending {path.suffix!r}",
            expected="a PNG file's path",
            fix="choose a name that ends in .png",
        )
    entries = [entry for entry in document["results"] if "speedup" in entry]
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    places = list(dict.fromkeys(map(_place, entries)))

    def bars(figure: Any) -> bool:
        axes = figure.subplots()
        width = 0.8 / max(1, len(names))
        for index, name in enumerate(names):
            at = {_place(entry): entry["speedup"] for entry in entries if entry["name"] == name}
            where = [place + width * index for place, key in enumerate(places) if key in at]
            axes.bar(where, [at[key] for key in places if key in at], width, label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        labels = [f"batch {b}\n{n} new tokens" + (f"\nafter {p}" if p else "") for b, n, p in places]
        axes.set_xticks([place + width * (len(names) - 1) / 2 for place in range(len(places))], labels)
        axes.set_ylabel("tokens/s against plain AR")
        axes.set_title(f"{document['checkpoint']}, {document['dtype']} on {document['device']}")
        axes.legend(fontsize="small")
        return True

    image = png(bars, (2 + 1.6 * max(2, len(places)) + 0.3 * len(names), 4))
    assert image is not None
    with own_file(path):
        write_file(path, image)


def _place(entry: dict[str, Any]) -> tuple[int, int, int | None]:
    return entry["batch_size"], entry["max_new_tokens"], entry["prompt_tokens"]
