"""The documentation as tests see it: pages, fenced blocks with their marks, and the commands in these.

A mark is a comment before a fence and says how its block is tested; several may stand there.

    <!-- test: with run, gated -->     these stand-ins (world.py) lie in the folder before it
    <!-- test: parse, REASON -->       its commands are only parsed, for the reason given
    <!-- test: slow -->                they run in the slow test of the page, and are parsed in the quick one
    <!-- test: file NAME -->           its text is written into that file
    <!-- test: exit 1 -->              its commands end with this code
    <!-- test: output -->              a console block shows all that its commands print
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "cli.md")]
"""all but the commands' reference, which is made of their help and tested with it (tests/cli)"""
SHELL = ("sh", "console")
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- test: (\w+),? ?(.*?) -->")
_OPERATORS = ("&&", ">", "<", "|", ";")


@dataclass(frozen=True)
class Command:
    """One command of a line: its words, what stands in its environment, and where its streams go."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    stdin: str | None = None
    stdout: str | None = None
    output: str = ""
    """what the page shows below it, in a console block"""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[Command]:
        """Of a block in sh every line is one; in a console those behind a `$`."""
        if self.language == "sh":
            return [command for line in _joined(self.text) for command in parse(line)]
        found: list[Command] = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            line, *rest = _joined(part)
            found += [Command(c.words, c.environment, c.stdin, c.stdout, "\n".join(rest)) for c in parse(line)]
        return found


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for fence in _FENCE.finditer(text):
        before = text[end : fence.start()].rstrip("\n").rsplit("\n\n", 1)[-1]
        lines = [line for line in before.split("\n") if _MARK.fullmatch(line)]
        marks = {mark[1]: mark[2] for line in lines if (mark := _MARK.fullmatch(line))}
        found.append(Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], fence[2], marks))
        end = fence.end()
    return found


def parse(line: str) -> list[Command]:
    """The commands of a line of shell, as far as our pages need it: no quotes within words, no loops.

    >>> [c.stdout for c in parse("KEY=1 zconvert bench ./run --json > bench.json && zconvert plan ./run  # both")]
    ['bench.json', None]
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&><|;")
    lexer.whitespace_split = True
    found: list[Command] = []
    words: list[str] = []
    places: dict[str, str] = {}
    tokens = [*lexer, "&&"]
    for number, token in enumerate(tokens):
        if token in (">", "<"):
            places[token] = tokens[number + 1]
        elif token == "&&":
            environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
            rest = tuple(word for word in words if not re.match(r"[A-Z_]+=", word))
            if rest:
                found.append(Command(rest, environment, places.get("<"), places.get(">")))
            words, places = [], {}
        elif token in _OPERATORS:
            raise ValueError(f"the tests of pages do not know {token!r}: {line}")
        elif tokens[number - 1] not in (">", "<"):
            words.append(token)
    return found


def _joined(text: str) -> list[str]:
    """Lines, those that end in a backslash with the next one."""
    return text.replace("\\\n", " ").rstrip("\n").split("\n")
