"""Help as a manual page: what it is, arguments, options by theme, examples that can be copied, in any width.

Typer's own layout cuts long option names and leaves their help a column of 18 letters in 80. The page is made of
`Part`s, from which docs/cli.md is written too (reference.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from zconvert.cli import ui

WIDEST = 100
"""columns: longer lines are hard to read"""
_NARROWEST = 32
_STACKED = 60  # in fewer columns the help of an option stands below it
_NAMES = 26  # columns for names; a longer one has a line of its own

_LABELS = {
    **dict.fromkeys(("int", "int range", "integer", "integer range"), "N"),
    **dict.fromkeys(("float", "float range"), "X"),
    **dict.fromkeys(("str", "text"), "TEXT"),
    "path": "PATH",
}
"""how Typer, by its version, names the kind of a value → what stands for it here"""

ENVIRONMENT = [
    ("HF_HOME", "Folder of what is fetched from the Hub, and of its token."),
    ("HF_TOKEN", "Token for the Hub; --token comes before it."),
    ("HF_HUB_OFFLINE", "1: use what was fetched before, ask the Hub nothing."),
    ("OMP_NUM_THREADS", "CPU threads of torch; --threads comes before it."),
    ("NO_COLOR", "Any value: no colours."),
    ("ZCONVERT_API_KEY", "Key that clients of `zconvert serve` must send."),
    ("ZCONVERT_DEBUG", "1: errors show where in the code they happened."),
]
EXIT_STATUS = [
    ("0", "All went well."),
    ("1", "An error, told on stderr; nothing is left half-written."),
    ("2", "Wrong usage: an option or argument that cannot be."),
    ("130", "Interrupted by Ctrl-C (143: by SIGTERM); training continues with the same command."),
]


@dataclass(frozen=True)
class Part:
    """A stretch of a help page.

    Args:
        title: its headline; empty for what a command does.
        rows: names and what is said of them.
        lines: lines of text; those of a part without rows are paragraphs, or commands where `verbatim`.
        verbatim: lines are shown as they are.
    """

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    verbatim: bool = False


def examples(*commands: str) -> str:
    """The epilog of a command, which `parts` reads: lines of at most 78 columns, longer ones broken by a backslash."""
    return "\n".join(commands)


def parts(command: Any, context: Any) -> Iterator[Part]:
    """What the help of a command says.

    Args:
        command: of Typer.
        context: of the command.
    """
    yield Part("", lines=[" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n")])
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            name, panel = _name(parameter, record[0]), getattr(parameter, "rich_help_panel", None)
            kind = "Arguments" if parameter.param_type_name == "argument" else panel or "Options"
            panels.setdefault(kind, []).append((name, _said(parameter, record[1], name)))
    for title, rows in _commands(command, context).items():
        yield Part(title, rows=rows)
    order = {"Arguments": -1, "Options": 0}
    for title in sorted(panels, key=lambda title: order.get(title, 1)):
        yield Part(title, rows=panels[title])
    if context.parent is None:
        yield Part("Environment", rows=ENVIRONMENT)
        yield Part("Exit status", rows=EXIT_STATUS)
    if command.epilog:
        yield Part("Examples", lines=command.epilog.split("\n"), verbatim=True)


def usage(command: Any, context: Any) -> str:
    """How the command is called, on one line."""
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def render(called: str, page: list[Part], width: int) -> Text:
    """A help page.

    Args:
        called: what `usage` gave.
        page: what `parts` gave.
        width: columns of the terminal.
    """
    width = max(_NARROWEST, min(width, WIDEST))
    text = Text.assemble(("Usage: ", "bold"), ui.wrap(called, width, first=7, indent=7), "\n")
    for part in page:
        text.append("\n")
        if part.title:
            text.append(f"{part.title}:\n", style="bold")
        for number, line in enumerate(part.lines):
            if part.verbatim:
                text.append(f"  {line}\n", style="cyan")
            else:
                text.append(("\n" if number else "") + ui.wrap(line, width) + "\n")
        names = max((len(name) for name, _ in part.rows if len(name) <= _NAMES), default=0)
        for name, said in part.rows:
            text.append("  ").append(name, style="cyan")
            if width < _STACKED:
                text.append(f"\n      {ui.wrap(said, width, first=6, indent=6)}\n")
                continue
            left = names + 4
            gap = " " * (left - 2 - len(name)) if len(name) <= names else "\n" + " " * left
            text.append(f"{gap}{ui.wrap(said, width, first=left, indent=left)}\n")
    return text


class _Page:
    """Gives a command of Typer this help and this usage line; to be named before Typer's class."""

    def collect_usage_pieces(self, context: Any) -> list[str]:
        """Arguments in the usual notation: what may be left out in brackets, dots where there may be several."""
        command: Any = self
        pieces = [command.options_metavar]
        for parameter in command.get_params(context):
            if parameter.param_type_name == "argument":
                name = _name(parameter, "") + ("..." if parameter.nargs == -1 else "")
                pieces.append(name if parameter.required else f"[{name}]")
        return [*pieces, "COMMAND [ARGS]..."] if hasattr(command, "commands") else pieces

    def format_help(self, context: Any, formatter: Any) -> None:
        """Writes the page; colours reach a terminal alone."""
        with ui.out.capture() as captured:
            page = render(usage(self, context), list(parts(self, context)), ui.out.width)
            ui.out.print(page, soft_wrap=True, end="")
        formatter.write(captured.get())

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        """As Typer does; its checker's messages lack what was given, and have words of its own."""
        try:
            parsed: list[str] = super().parse_args(context, arguments)  # type: ignore[misc]
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            cause: Any = error.__cause__
            if hasattr(cause, "errors"):
                found = cause.errors()[0].get("input")
                error.message = re.sub(r"^Input\b", repr(found), error.message)
            raise
        return parsed


class Command(_Page, TyperCommand):
    """A command with this help."""


class Group(_Page, TyperGroup):
    """A group of commands with this help."""

    def invoke(self, context: Any) -> Any:
        """As Typer does it; in a terminal, messages of wrong usage are folded between words, not by the terminal."""
        try:
            return super().invoke(context)
        except Exception as error:
            if context.parent is None and ui.err.is_terminal and hasattr(error, "format_message"):
                said = ui.wrap(error.format_message(), ui.err.width, first=len("Error: "), indent=2)
                error.format_message = lambda: said
            raise


def _name(parameter: Any, record: str) -> str:
    """An argument by its name; an option by its flags, and what stands for its value."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    flags, kind, _ = re.fullmatch(r"((?:-\S+(?:, | / )?)+) ?(.*?)(\.\.\.)?", record, re.DOTALL).groups()  # type: ignore[union-attr]
    if parameter.metavar is not None:
        return f"{flags.strip()} {parameter.metavar}"
    kind = kind.strip("<>[]").removeprefix("list[")
    return f"{flags.strip()} {_LABELS.get(kind.lower(), kind)}".rstrip()


def _said(parameter: Any, said: str, name: str) -> str:
    """The help of a parameter; what Typer adds in brackets in plain words."""
    text = parameter.help or ""
    added = said.removeprefix(text).strip().removesuffix("]").lstrip("\\[")  # older ones escape the bracket
    added = re.sub(r"default: \((.*?)\)", r"default: \1", added)
    added = re.sub(r"\bx\b", name.rsplit(" ", 1)[-1] if " " in name else "N", added).replace("; ", ", ")
    return f"{text} [{added}]" if added else text


def _commands(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """The commands of a group, by theme, in the order in which they were added."""
    themes: dict[str, list[tuple[str, str]]] = {}
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        each = command.get_command(context, name)
        themes.setdefault(getattr(each, "rich_help_panel", None) or "Commands", []).append((name, summary(each)))
    return themes


def summary(command: Any) -> str:
    """The first sentence of a command's help."""
    return " ".join(re.split(r"(?<=\.)\s|\n\n", command.help or "", maxsplit=1)[0].split())
