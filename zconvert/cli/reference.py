"""Writes docs/cli.md, the reference of all commands, from their help: `python -m zconvert.cli.reference`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from zconvert.cli.help import Part, parts, usage
from zconvert.cli.main import app

FILE = Path(__file__).parent.parent.parent / "docs" / "cli.md"
_HEAD = """\
# Commands

Made from the commands' own help by `make docs`; `zconvert COMMAND --help` says the same.

Results go to stdout, progress and errors to stderr. With `--json`, stdout is one JSON document and nothing else.

Tab completion for bash, zsh and fish: `zconvert --install-completion`, or `zconvert --show-completion` to see it first.
"""


def walk() -> Iterator[tuple[Any, Any]]:
    """Each command with its context: zconvert itself, then all others, in the order of --help."""

    def below(command: Any, context: Any) -> Iterator[tuple[Any, Any]]:
        yield command, context
        for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
            each = command.get_command(context, name)
            yield from below(each, typer.Context(each, info_name=name, parent=context, **each.context_settings))

    command: Any = typer.main.get_command(app)
    yield from below(command, typer.Context(command, info_name="zconvert", **command.context_settings))


def document() -> str:
    """The reference, in Markdown."""
    pages = [_HEAD]
    for command, context in walk():
        pages.append(f"## {context.command_path}\n\n```\n{usage(command, context)}\n```\n")
        pages += [_section(part) for part in parts(command, context)]
    return "\n".join(pages)


def _section(part: Part) -> str:
    title = f"**{part.title}**\n\n" if part.title else ""
    if part.verbatim:
        return f"{title}```\n" + "".join(f"{line}\n" for line in part.lines) + "```\n"
    if part.rows:
        rows = [f"| `{name}` | {said.replace('<', '&lt;')} |" for name, said in _escaped(part.rows)]
        return "\n".join([f"{title}| | |", "|---|---|", *rows, ""])
    return title + "\n\n".join(part.lines) + "\n"


def _escaped(rows: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Rows for a table: its bars are escaped, in code too."""
    for name, said in rows:
        yield name.replace("|", "\\|"), said.replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
