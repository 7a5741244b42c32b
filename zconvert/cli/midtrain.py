"""`zconvert midtrain`: diffusion mid-training by a recipe."""

from __future__ import annotations

from zconvert.cli.launch import TorchrunOptions
from zconvert.cli.training import RecipeFile, print_made, run


def command(recipe: RecipeFile, torchrun: TorchrunOptions = None) -> None:
    """Train a converted checkpoint on the AR and the diffusion loss.

    Stopped at any moment, the same command continues. The recipe's output_dir gets metrics.jsonl, train_state/ and, at
    the end, checkpoint/, whose path is printed.
    """
    from zconvert.recipe import MidtrainRecipe, load_recipe

    settings = load_recipe(recipe, MidtrainRecipe)
    print_made(settings, run(settings, recipe, torchrun))
