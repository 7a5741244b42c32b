"""What every command shares: the two consoles, JSON on stdout, and errors in a form people can act on."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from zconvert.errors import UserError, out_of_memory

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""errors of a write; where no file is named it was to stdout, since writes to files are told of as `UserError`"""

# rich takes NO_COLOR to mean no colours, and leaves bold; here it means plain text.
_COLORS: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"


class _SafeConsole(Console):
    """Prints what strangers wrote in checkpoints, rows and texts as text: no markup, and nothing steers a terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does it; all that is printed comes through here, tables and bars too."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=safe(segment.text))


def safe(text: str) -> str:
    r"""Without control characters, which would steer the terminal or turn the direction of the text around them.

    >>> safe("a\x1b[2Jb\u202e")
    'a�[2Jb�'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _HARMLESS else "\N{REPLACEMENT CHARACTER}" for c in text)


# White space of other scripts, and the joiners of some, are harmless too.
_HARMLESS = frozenset("\n\t\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\u200c\u200d")

out = _SafeConsole(highlight=False, markup=False, emoji=False, color_system=_COLORS)
"""results: tables and text on stdout"""
err = _SafeConsole(stderr=True, highlight=False, markup=False, emoji=False, color_system=_COLORS)
"""progress and errors on stderr"""

Command = TypeVar("Command", bound=Callable[..., Any])


def print_json(document: Any) -> None:
    """Writes one JSON document to stdout, plain: no colours, no line folding, ASCII, so that any pipe can read it.

    Args:
        document: what `json.dumps` takes; NaN and infinities are refused, since JSON has none.
    """
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def size(count: int) -> str:
    """Bytes for people.

    >>> size(3_540_000)
    '3.5 MB'
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def plural(count: int, noun: str) -> str:
    """A count and what is counted.

    >>> plural(1, "sample"), plural(2, "sample")
    ('1 sample', '2 samples')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def show_facts(rows: Iterable[tuple[str, str]], *, indent: int = 2, style: str = "") -> None:
    """Prints names and what there is to say of them, a line each; what is long is folded beside its name.

    Args:
        rows: names, and what is said of them.
        indent: columns before the names.
        style: of the names.
    """
    facts = list(rows)
    left = indent + max((len(name) for name, _ in facts), default=0) + 2
    for name, said in facts:
        text = Text(" " * indent).append(name.ljust(left - indent), style=style)
        # Folded by `wrap`: rich breaks words longer than a line, and a broken path cannot be copied.
        out.print(text.append(wrap(said, max(left + 20, out.width), first=left, indent=left)), soft_wrap=True)


def show_table(table: Table, console: Console = out) -> None:
    """Prints a table of numbers, wider than the terminal if it has to be: rich would cut them to make them fit."""
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def progress() -> Progress:
    """A bar on stderr for what is counted; none where nobody looks on."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def handled(command: Command) -> Command:
    """Wraps a command's function so that no error ends in a traceback (unless `ZCONVERT_DEBUG=1`).

    A `UserError` exits 1 with what was found, what was expected and the fix; any other exception exits 1 with its one
    line; Ctrl-C exits 130. Typer's own exits and usage errors (2) pass through, and so does a reader that closed the
    pipe (`zconvert inspect X | head`).
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            done = command(*args, **kwargs)
            sys.stdout.flush()  # what cannot be written is told here, while there are words for it
            return done
        except UserError as error:
            _print_traceback()
            print_error(error)
        except KeyboardInterrupt:
            _print_traceback()
            err.print("Interrupted.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            if type(error).__module__.split(".")[0] in ("typer", "click"):
                raise
            if (said := out_of_memory(error)) is not None:
                _print_traceback()
                print_error(_too_little_memory(said, kwargs))
            elif isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
                _print_traceback()
                print_error(_lost_output(error))
            else:
                _print_unexpected(error)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the tokenizers library, such as by a pattern of no end
                raise
            _print_unexpected(error)
        raise typer.Exit(EXIT_ERROR)

    return run  # type: ignore[return-value]


def end_on_sigterm() -> None:
    """Has SIGTERM end this process as an exception would, so that nothing is left half-written; a second one kills."""
    owner = os.getpid()

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a fork, which has nothing to clean up
            os.kill(os.getpid(), number)
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"Terminated.\n")  # the console may be in the middle of a line
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def print_error(error: UserError) -> None:
    """Prints a `UserError` on stderr: a headline, then the found, expected and fix parts hanging under their names."""
    _print_parts("Error", error.what, (("found", error.found), ("expected", error.expected), ("fix", error.fix)))


def _too_little_memory(said: str, options: dict[str, Any]) -> UserError:
    if "checkpoint" in options and "batch_size" in options:
        from zconvert.planning.out_of_memory import too_little_for_decoding

        return too_little_for_decoding(str(options["checkpoint"]), said, options)
    return UserError("there is too little memory", found=said, fix="close other programs, or take a larger machine")


def _lost_output(error: OSError) -> UserError:
    """What is wrong with stdout; what it still holds is dropped, or it would fail again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UserError(
        "what the command prints cannot be written",
        found=error.strerror,
        fix="free some space where its output goes, and run it again",
    )


def _print_unexpected(error: BaseException) -> None:
    _print_traceback()
    line = " ".join(str(error).split())
    what = f"{type(error).__name__}: {line}" if line else type(error).__name__
    fix = (
        None if _debugging() else "set ZCONVERT_DEBUG=1 to see where it happened, and report it if it looks like a bug"
    )
    _print_parts("Unexpected error", what, (("fix", fix),))


def _print_parts(title: str, what: str, parts: tuple[tuple[str, str | None], ...]) -> None:
    # Wrapped here rather than by rich, which breaks words longer than a line: a broken path cannot be copied.
    width = max(40, err.width)
    text = Text()
    text.append(f"{title}: ", style="bold red")
    text.append(wrap(what, width, first=len(title) + 2, indent=2))
    for name, part in parts:
        if part is not None:
            text.append(f"\n  {name + ':':<10}", style="bold")
            text.append(wrap(part, width, first=12, indent=12))
    err.print(text, soft_wrap=True)


def wrap(text: str, width: int, *, first: int = 0, indent: int = 0) -> str:
    """Folds each line of `text` to `width` columns; line one starts at column `first`, the others at `indent`."""
    lines: list[str] = []
    for number, line in enumerate(text.splitlines() or [""]):
        lines += textwrap.wrap(
            line,
            width,
            initial_indent=" " * (first if number == 0 else indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)[first:]


def _debugging() -> bool:
    return os.environ.get("ZCONVERT_DEBUG", "0") not in ("", "0")


def _print_traceback() -> None:
    if _debugging():
        text = traceback.format_exc()
        sys.stderr.write(safe(text) if sys.stderr.isatty() else text)
