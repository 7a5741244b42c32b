"""What strangers wrote is shown as text: it neither steers the terminal nor is taken for markup."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from tests.security.commands import edit_json, refused, run
from tests.training.test_sft import conversation, make_sft
from zconvert.checkpoint.headers import SINGLE_FILE
from zconvert.cli import ui
from zconvert.cli.streaming import show_blocks, show_plain
from zconvert.errors import UserError
from zconvert.recipe import dump_recipe

STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\u202e"
"""sets the title, clears the screen, colours the text, and turns its direction"""
MARKUP = "[red]a[/b] [link=https://evil.example]click[/link] :bomb:"


def is_harmless(text: str) -> bool:
    return not set(STEERING) - set("]0;title[2J31m") & set(text)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 100 columns gets, without colours of our own."""
    shown = io.StringIO()
    for console in (ui.out, ui.err):
        monkeypatch.setattr(console, "_file", shown)
        monkeypatch.setattr(console, "_force_terminal", True)
        monkeypatch.setattr(console, "_color_system", None)
        monkeypatch.setattr(console, "_width", 100)
    return shown


def test_every_way_to_print_shows_text_as_text(terminal: io.StringIO) -> None:
    table = Table(STEERING, title=MARKUP)
    table.add_row(STEERING + MARKUP)
    for shown in (STEERING + MARKUP, Text(STEERING + MARKUP), table):
        ui.out.print(shown, soft_wrap=True)
    ui.show_facts([(STEERING, MARKUP)])
    ui.print_error(UserError(STEERING, found=STEERING, expected=MARKUP, fix=STEERING))
    show_blocks(STEERING + MARKUP, 0)
    assert is_harmless(terminal.getvalue())
    assert terminal.getvalue().count(MARKUP) >= 5


def test_text_on_a_terminal_is_harmless_and_in_a_pipe_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (True, False):
        stdout = io.StringIO()
        monkeypatch.setattr(stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr("sys.stdout", stdout)
        show_plain(STEERING + "é\u00a0一\u200d", 0)
        assert is_harmless(stdout.getvalue()) == is_terminal
        assert stdout.getvalue().endswith("é\u00a0一\u200d")


def test_half_a_character_is_shown_too() -> None:
    assert ui.safe("a\ud800b") == "a\N{REPLACEMENT CHARACTER}b"


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("mixtral")


@pytest.mark.parametrize("text", [STEERING, MARKUP, "\ud800"])
def test_a_configurations_texts_are_shown_as_text(folder: Path, text: str) -> None:
    edit_json(folder / "config.json", architectures=[text], layer_types=[text, text])
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert is_harmless(result.output)
    edit_json(folder / "config.json", layer_types=None, model_type=text)
    assert is_harmless(run("inspect", folder).output)


def test_an_error_that_quotes_a_header_is_harmless(folder: Path) -> None:
    header = json.dumps({STEERING + MARKUP: {"dtype": STEERING, "shape": [], "data_offsets": [0, 0]}}).encode()
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", len(header)) + header)
    assert is_harmless(refused("inspect", folder))


def test_a_recipe_and_a_row_are_quoted_harmlessly(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"{json.dumps(STEERING)}: {json.dumps(MARKUP)}\nseed: {json.dumps(STEERING)}\n"
    )
    assert is_harmless(refused("midtrain", tmp_path / "recipe.yaml"))
    recipe = make_sft(tmp_path, sequence_len=256)
    (tmp_path / "sft.yaml").write_text(dump_recipe(recipe))
    row = conversation(f"ten {STEERING}", f"tall {MARKUP}")
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    result = run("sft", tmp_path / "sft.yaml", "--show-example")
    assert result.exit_code == 0, result.output
    assert is_harmless(result.output)
    (tmp_path / "chat.jsonl").write_text(json.dumps({STEERING: 1}) + "\n")
    assert is_harmless(run("sft", tmp_path / "sft.yaml", "--show-example").output)


def test_a_traceback_is_harmless_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCONVERT_DEBUG", "1")
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", stderr)

    @ui.handled
    def command() -> None:
        raise UserError(STEERING)

    with pytest.raises(Exception, match="1"):
        command()
    assert "Traceback" in stderr.getvalue()
    assert is_harmless(stderr.getvalue())
