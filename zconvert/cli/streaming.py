"""What `generate` and its chat share: text on the terminal as it is decoded, and the tally of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zconvert.cli.ui import out, plural, safe

if TYPE_CHECKING:
    from zconvert.serving.text import GrowingText
    from zconvert.tidar.decoding import Request, Result, Step
    from zconvert.tidar.engine import Engine

_BLOCK_STYLES = ("black on bright_cyan", "black on bright_yellow")

Show = Callable[[str, int], None]
"""gets a piece of text and the number of its forward"""


class Tally:
    """Tokens, forwards and time of a decoding."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.tokens = 0
        self.forwards = 0
        self.seconds = 0.0

    def timed(self, forward: Callable[[], list[tuple[Result, Step]]]) -> None:
        """Runs an engine's step and counts what it gave."""
        start = time.perf_counter()
        events = forward()
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(step.tokens) for _, step in events)
        self.forwards += len(events)

    @property
    def tokens_per_forward(self) -> float | None:
        """Without the prefill and its token; None where nothing followed it."""
        return (self.tokens - 1) / (self.forwards - 1) if self.forwards > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "tokens": self.tokens,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }

    def __str__(self) -> str:
        """One line for people."""
        each = self.tokens_per_forward
        mean = "" if each is None else f" ({each:.2f} tokens each after the prefill)"
        counts = f"{plural(self.tokens, 'token')} in {plural(self.forwards, 'forward')}"
        return f"{counts}{mean}, {self.tokens / self.seconds:.1f} tokens/s"


def write(
    engine: Engine,
    request: Request,
    text: GrowingText,
    show: Show,
    tally: Tally,
    *,
    wanted: Callable[[], bool] = lambda: True,
) -> tuple[str, Result]:
    """Decodes a text and shows each forward's piece of it.

    Args:
        engine: with nothing to do.
        request: its `stop` is replaced by the text's.
        text: that is to grow.
        show: see Show.
        tally: counts along.
        wanted: asked before each forward; the text ends where it says no.

    Returns:
        the whole text, and the engine's result.
    """
    pieces: list[str] = []

    def stop(tokens: list[int]) -> int | None:
        whole = text.stop(tokens)
        pieces.append(text.take())
        return whole

    result = engine.add(replace(request, stop=stop))
    while not engine.idle:
        if not wanted():
            engine.cancel(result)
        shown = len(pieces)
        tally.timed(engine.step)
        for number in range(shown, len(pieces)):
            show(pieces[number], number)
    pieces.append(text.take(final=True))
    show(pieces[-1], len(pieces) - 2)
    return "".join(pieces), result


def show_plain(piece: str, forward: int) -> None:
    """As it is; a terminal gets no control characters."""
    text = safe(piece) if sys.stdout.isatty() else piece  # a file or a pipe gets the text as it is
    sys.stdout.write(text)
    sys.stdout.flush()


def show_blocks(piece: str, forward: int) -> None:
    """Each forward in another colour than the one before; in brackets on a terminal without colours."""
    if out.is_terminal and out.color_system is None and piece:
        piece = f"[{piece}]"
    out.print(Text(piece, style=_BLOCK_STYLES[forward % 2]), end="", soft_wrap=True)


def show_nothing(piece: str, forward: int) -> None:
    """It is told in another way."""
