"""`zconvert extend-context`: the table of losses by position, and what is told of a wrong recipe."""

from __future__ import annotations

import json
from pathlib import Path

from tests.commands import run_command
from tests.training.test_context import extension_run


def test_losses_by_position_are_shown_before_and_after(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(extension_run(tmp_path)))
    result = run_command("extend-context", recipe)
    assert result.exit_code == 0, result.output
    assert "trained before with 16 positions" in " ".join(result.output.split())
    assert "48 – 63" in result.output
    assert "config.json changes: rope_parameters.hybrid.rope_theta 10000.0 → 63496." in result.output
    assert result.stdout.replace("\n", "").endswith("run/checkpoint")


def test_settings_that_contradict_each_other_are_told_by_name(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    settings = extension_run(tmp_path, rope="linear", rope_theta=1e6)
    recipe.write_text(json.dumps(settings))
    result = run_command("extend-context", recipe)
    assert result.exit_code == 1
    assert "context.rope_theta" in result.output
    recipe.write_text(json.dumps({**settings, "context": {"target_len": 32}}))
    result = run_command("extend-context", recipe)
    assert "at least sequence_len" in " ".join(result.output.split())
