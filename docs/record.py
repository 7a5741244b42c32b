"""Runs commands of zconvert in a terminal of 80 columns, and draws what they showed as a terminal window (SVG).

    python docs/record.py docs/quickstart.svg \
        "zconvert generate out/quickstart/run --show-blocks --prompt 'Mia has 27 apples. …'" \
        "zconvert bench out/quickstart/run --prompts out/quickstart/prompts.jsonl --threads 1"

Results come from a pseudo-terminal, as they are; what goes to stderr follows behind them, without progress bars.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 80


def main() -> None:
    """Runs the commands one after another; one that fails ends it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="SVG file to write")
    parser.add_argument("commands", nargs="+", help="as they are typed")
    args = parser.parse_args()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    for line in args.commands:
        console.print(Text.assemble(("$ ", "bold green"), line), soft_wrap=False)
        console.print(Text.from_ansi(run(shlex.split(line)).rstrip()))
        console.print()
    args.out.write_text(console.export_svg(title="zconvert", theme=MONOKAI, unique_id="run"), encoding="utf-8")


def run(words: list[str]) -> str:
    """What a command writes to a terminal, then what it writes to stderr."""
    inner, outer = pty.openpty()
    fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-m", "zconvert", *words[1:]]
    with subprocess.Popen(command, stdout=outer, stderr=subprocess.PIPE, env=environment) as process:
        os.close(outer)
        shown = b""
        while chunk := _read(inner):
            shown += chunk
        assert process.stderr is not None
        errors = process.stderr.read()
    os.close(inner)
    if process.returncode:
        sys.exit(errors.decode())
    return (shown.replace(b"\r\n", b"\n") + errors).decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so where the other end is closed
        return b""


if __name__ == "__main__":
    main()
