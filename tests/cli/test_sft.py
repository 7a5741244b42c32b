"""`zconvert sft`: what it shows before it trains."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.commands import run_command
from tests.training.test_sft import make_sft
from zconvert.cli import sft
from zconvert.recipe import dump_recipe


def test_show_example_marks_what_is_scored_and_trains_nothing(tmp_path: Path) -> None:
    recipe = make_sft(tmp_path)
    (tmp_path / "sft.yaml").write_text(dump_recipe(recipe))
    result = run_command("sft", tmp_path / "sft.yaml", "--show-example")
    assert result.exit_code == 0, result.output
    assert "user<bos> ten<eos>" in result.stdout
    assert "[[tall trees<eos>]]" in result.stdout
    assert not Path(recipe.output_dir).exists()


def test_show_example_says_why_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(dump_recipe(make_sft(tmp_path, chat_template=None)))
    result = run_command("sft", tmp_path / "sft.yaml", "--show-example")
    assert result.exit_code == 1
    assert "the tokenizer has no chat template" in " ".join(result.stderr.split())


def test_show_example_is_coloured_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sft.yaml").write_text(dump_recipe(make_sft(tmp_path)))
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False)
    monkeypatch.setattr(sft, "out", terminal)
    result = run_command("sft", tmp_path / "sft.yaml", "--show-example")
    assert result.exit_code == 0, result.output
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1;32mtall trees<eos>\x1b[0m" in shown
    assert "[[" not in shown
