"""The speedup map as one HTML file that needs nothing else: tables with coloured cells, the arithmetic on hovering."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from zconvert.planning.decoding import Cell
from zconvert.planning.plan import count_of

MODES = {"single": "One forward a step (best proposal set)", "two": "Two forwards a step"}
_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 2rem }
th { font-weight: 500; padding: .3rem .7rem; text-align: right; color: #555 }
td { padding: .45rem .9rem; text-align: center; border: 2px solid #fff; min-width: 3.2rem }
td.out { opacity: .35 }
small { color: #666 }
"""


def heat_map(cells: Sequence[Cell], title: str, lines: Sequence[str]) -> str:
    """An HTML page with a map for each mode.

    Args:
        cells: the predictions.
        title: of the page.
        lines: sentences to put on top.
    """
    body = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    body += "".join(_table([cell for cell in cells if cell.mode == mode], title) for mode, title in MODES.items())
    note = (
        "Speedup over plain AR decoding at that batch and context. Green pays, red loses, pale cells do not fit into "
        "memory. Hover over a cell for its break-even."
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}<small>{note}</small></html>\n"
    )


def colour_of(speedup: float) -> str:
    """White at 1×, green above, red below, full at 4× and at a quarter.

    >>> colour_of(1.0)
    '#ffffff'
    """
    strength = max(-1.0, min(1.0, math.log(max(speedup, 1e-3)) / math.log(4)))
    full = (38, 150, 80) if strength > 0 else (200, 60, 50)
    red, green, blue = (round(255 + (value - 255) * abs(strength)) for value in full)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _table(cells: Sequence[Cell], title: str) -> str:
    if not cells:
        return ""
    batches = sorted({cell.batch_size for cell in cells})
    contexts = sorted({cell.context for cell in cells})
    by_place = {(cell.batch_size, cell.context): cell for cell in cells}
    head = "".join(f"<th>{batch}</th>" for batch in batches)
    rows = "".join(
        f"<tr><th>{context:,}</th>{''.join(_cell(by_place[batch, context]) for batch in batches)}</tr>"
        for context in contexts
    )
    return f"<h2>{title}</h2><table><tr><th>context \\ batch</th>{head}</tr>{rows}</table>"


def _cell(cell: Cell) -> str:
    proposals = ", ".join(map(str, cell.proposals)) or "none"
    told = (
        f"batch {cell.batch_size}, context {count_of(cell.context)}: {cell.accepted:.2f} accepted, "
        f"breaks even at {cell.break_even_accepted:.2f}; block {cell.block_size}, proposals {proposals}"
        f"{'' if cell.fits else '; does not fit'}"
    )
    kind = "" if cell.fits else ' class="out"'
    return f'<td{kind} style="background:{colour_of(cell.speedup)}" title="{told}">{cell.speedup:.2f}×</td>'
