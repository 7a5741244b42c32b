"""`zconvert sft`: training on conversations by a recipe, and a look at one as it is scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from zconvert.cli.launch import TorchrunOptions
from zconvert.cli.training import RecipeFile, print_made, run
from zconvert.cli.ui import err, out

if TYPE_CHECKING:
    from zconvert.recipe import SftRecipe


def command(
    recipe: RecipeFile,
    show_example: Annotated[
        bool,
        typer.Option("--show-example", help="Print the first conversation, coloured where it is scored, and stop."),
    ] = False,
    torchrun: TorchrunOptions = None,
) -> None:
    """Train a converted checkpoint on conversations, scored where the assistant speaks.

    Stopped at any moment, the same command continues. --show-example shows first what would be scored.
    """
    from zconvert.recipe import SftRecipe, load_recipe

    settings = load_recipe(recipe, SftRecipe)
    if show_example:
        _show(settings)
        return
    print_made(settings, run(settings, recipe, torchrun))


def _show(settings: SftRecipe) -> None:
    from zconvert.training.stages import example

    name, stretches = example(settings)
    # Where there are no colours, double brackets stand in for them.
    coloured = out.color_system is not None
    begin, end = ("", "") if coloured else ("[[", "]]")
    err.print(Text(f"The first conversation of {name}; scored is what is {'green' if coloured else 'in [[ ]]'}:"))
    text = Text()
    for stretch, scored in stretches:
        text.append(f"{begin}{stretch}{end}" if scored else stretch, style="bold green" if scored else "dim")
    out.print(text, soft_wrap=True)
