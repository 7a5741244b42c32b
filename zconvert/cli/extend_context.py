"""`zconvert extend-context`: training on longer documents, with positions that reach further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from zconvert.cli.launch import TorchrunOptions, speaks
from zconvert.cli.training import RecipeFile, print_made, run
from zconvert.cli.ui import err, show_table


def command(recipe: RecipeFile, torchrun: TorchrunOptions = None) -> None:
    """Train on longer documents with positions that reach further.

    Tells the loss by position before and after. Stopped at any moment, the same command continues.
    """
    from zconvert.recipe import ExtendContextRecipe, load_recipe

    settings = load_recipe(recipe, ExtendContextRecipe)
    folder = run(settings, recipe, torchrun)
    if speaks():
        show_context(Path(settings.output_dir))
    print_made(settings, folder)


def show_context(run_dir: Path) -> None:
    """Prints a run's losses by position on stderr."""
    from zconvert.training.context import CONTEXT_FILE

    report = json.loads((run_dir / CONTEXT_FILE).read_text())
    err.print(f"Loss by position, nats a token; trained before with {report['original_len']:,} positions")
    show_table(_table(report), err)


def _table(report: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("positions", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for kind in ("AR", "diffusion"):
        table.add_column(f"{kind}\nbefore", justify="right", no_wrap=True)
        table.add_column("\nafter", justify="right", no_wrap=True)
    for before, after in zip(report["before"], report["after"], strict=True):
        losses = [_number(row[key]) for key in ("loss_ar", "loss_diffusion") for row in (before, after)]
        table.add_row(f"{before['from']:,} – {before['to'] - 1:,}", f"{before['tokens']:,}", *losses)
    return table


def _number(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"
