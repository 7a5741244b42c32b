"""Figures as PNG, and one HTML page that holds them and needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import writing
from zconvert.errors import UserError

PAGE = "report.html"
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "img{max-width:100%}td,th{padding:.2rem 1rem .2rem 0;text-align:right}td:first-child,th:first-child"
    "{text-align:left}pre{background:#f5f5f5;padding:1rem;overflow:auto}"
)


def require_drawing() -> None:
    """Raises a `UserError` where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError("drawing needs matplotlib", found=error, fix="pip install 'zconvert[report]'") from error


def png(draw: Callable[[Any], bool], size: tuple[float, float] = (8, 4)) -> bytes | None:
    """A figure as PNG.

    Args:
        draw: draws into a matplotlib figure; False: there is nothing to draw.
        size: in inches.

    Returns:
        the image; None where nothing was drawn.

    Raises:
        UserError: no matplotlib.
    """
    require_drawing()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")  # on its own, without a window system
    if not draw(figure):
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def write_page(folder: Path, title: str, images: Mapping[str, bytes], *, above: str, below: str = "") -> Path:
    """Writes a page with its images inside, and the images beside it; what an earlier report left there is replaced.

    Args:
        folder: made where it is missing.
        title: of the page, plain text.
        images: name → PNG.
        above: HTML before the images.
        below: HTML behind them.

    Returns:
        the page.

    Raises:
        UserError: the folder cannot be written.
    """
    pictures = "".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for name, image in images.items()
    )
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{above}{pictures}{below}</body></html>\n"
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            _place(folder / f"{name}.png", image)
        _place(folder / PAGE, text.encode())
    return folder / PAGE


def _place(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
