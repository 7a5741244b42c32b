"""What reaches stdout, stderr and a terminal: --json is one document, no escape codes where nobody sees colours."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tests.checkpoint.tiny import make_checkpoint
from tests.evaluation.test_evaluate import ROWS, write_task
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve
from zconvert.cli import ui
from zconvert.cli.main import app
from zconvert.cli.reference import walk
from zconvert.tidar.settings import GatedParts

SHORT = ["--device", "cpu", "--max-new-tokens", "4"]
CASES: dict[str, list[str]] = {
    "doctor": [],
    "inspect": ["{made}/source"],
    "plan": ["{made}/source", "--gpu", "cpu", "--gpus", "1"],
    "convert-init": ["{made}/source", "--out", "{new}", "--block-size", "4"],
    "convert-init --dry-run": ["{made}/source", "--out", "{new}"],
    "generate": ["{made}/init", "ten tall", *SHORT],
    "bench": ["{made}/init", "--num-prompts", "1", "--threads", "1", *SHORT],
    "evaluate": ["{made}/init", "--tasks", "{made}/words.yaml", "--out", "{new}", *SHORT],
    "evaluate --no-score": ["{made}/init", "--tasks", "{made}/words.yaml", "--out", "{new}", *SHORT],
    "score": ["{made}/evaluation"],
    "export": ["{made}/init", "--out", "{new}", "--no-verify"],
    "export --check all": ["{made}/init"],
    "export --merge-to-ar": ["{made}/gated", "--out", "{new}"],
}
"""a command with the options that decide what is printed → its other arguments; pushing is tested with the Hub"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, `init`, `gated`, a task and its evaluation."""
    folder = tmp_path_factory.mktemp("made")
    source = resolve(make_checkpoint(folder / "source", "zaya", dtype="float32"))
    convert_init(source, folder / "init", block_size=4)
    convert_init(source, folder / "gated", block_size=4, gated=GatedParts(rank=2, mlp_width=8))
    write_task(folder / "words.yaml", ROWS)
    words = ["evaluate", folder / "init", "--tasks", folder / "words.yaml", "--out", folder / "evaluation", *SHORT]
    assert app([str(word) for word in words], standalone_mode=False) is None
    return folder


def options_of(command: Any, context: Any) -> set[str]:
    return {option for parameter in command.get_params(context) for option in parameter.opts}


def test_every_command_that_has_json_is_among_the_cases() -> None:
    commands = {
        context.command_path.removeprefix("zconvert ")
        for command, context in walk()
        if "--json" in options_of(command, context)
    }
    assert {case.split(" ")[0] for case in CASES} == commands


@pytest.mark.parametrize("case", CASES)
def test_with_json_stdout_is_one_document_and_nothing_else(
    case: str, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(made=made, new=tmp_path / "new") for word in CASES[case]]
    command, *options = case.split(" ")
    capfd.readouterr()
    code = app([command, *words, *options, "--json"], standalone_mode=False)
    printed = capfd.readouterr()
    assert code is None, printed.err
    document = json.loads(printed.out)  # refuses anything before or behind it
    assert document
    assert printed.out.isascii()
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.parametrize("command", ["inspect", "plan", "generate", "bench", "export"])
def test_an_error_leaves_stdout_empty_with_json_too(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "new")] if command == "export" else []
    assert app([command, str(tmp_path / "missing"), *out, "--json"], standalone_mode=False) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: ")
    assert list(tmp_path.iterdir()) == []


def in_terminal(columns: int, *words: str, **environment: str) -> tuple[int, str]:
    """Runs zconvert in a terminal of so many columns; its exit status and all that it showed."""
    leader, follower = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    env |= {"TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONUTF8": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "zconvert", *words], stdin=follower, stdout=follower, stderr=follower, env=env
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 1 << 16)
        except OSError:  # how Linux says that nobody has the terminal open any more
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    return process.wait(timeout=60), shown.decode()


STYLES = re.compile(r"\x1b\[[\d;]*m")


def lines_of(shown: str) -> list[str]:
    """What stays on the screen: without styles, and without the lines of a display that was taken back."""
    return [re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", line.split("\r")[-1]) for line in shown.split("\r\n")]


def test_a_terminal_gets_colours_and_one_with_no_color_plain_text(made: Path) -> None:
    code, shown = in_terminal(80, "inspect", str(made / "source"))
    assert code == 0
    assert STYLES.search(shown)
    code, shown = in_terminal(80, "inspect", str(made / "source"), NO_COLOR="1")
    assert code == 0
    assert not STYLES.search(shown)
    assert "Can be converted" in shown


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_what_a_terminal_shows_fits_it(columns: int, made: Path) -> None:
    code, shown = in_terminal(columns, "inspect", str(made / "init"), NO_COLOR="1")
    assert code == 0
    long = [line for line in lines_of(shown) if len(line) > columns and "zconvert" not in line]
    assert long == []


@pytest.mark.parametrize("columns", [40, 80])
def test_wrong_usage_is_folded_between_words(columns: int) -> None:
    code, shown = in_terminal(columns, "evaluate", "x", "--samplers", "nothing", "--tasks", "gsm8k", NO_COLOR="1")
    assert code == 2
    lines = lines_of(shown)
    said = lines[next(at for at, line in enumerate(lines) if line.startswith("Error:")) :]
    assert max(map(len, said)) <= columns
    assert "'nothing' is no sampler, expected ar, lossless or mix:<w>" in " ".join(" ".join(said).split())


def test_an_error_in_a_narrow_terminal_keeps_paths_in_one_piece(made: Path) -> None:
    missing = str(made / ("a-long-name-" * 5) / "checkpoint")
    code, shown = in_terminal(40, "inspect", missing, NO_COLOR="1")
    assert code == 1
    assert missing in shown


def test_a_table_of_numbers_is_never_cut_to_fit() -> None:
    console = Console(width=40, file=io.StringIO())
    table = Table("", *map(str, range(9)))
    table.add_row("name", *["123.45"] * 9)
    ui.show_table(table, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("123.45") == 9
    assert "…" not in shown


def test_facts_are_folded_beside_their_name_and_never_within_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ui, "out", Console(width=40))
    ui.show_facts([("place", "free in /a/very/long/path/that/does/not/fit/into/it"), ("n", "two\nlines")])
    assert capsys.readouterr().out.splitlines() == [
        "  place  free in",
        "         /a/very/long/path/that/does/not/fit/into/it",
        "  n      two",
        "         lines",
    ]
