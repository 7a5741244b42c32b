"""`zconvert midtrain`: diffusion mid-training by a recipe."""

from __future__ import annotations

from zconvert.cli.training import RecipeFile, run
from zconvert.recipe import MidtrainRecipe, load_recipe


def command(recipe: RecipeFile) -> None:
    """Train a converted checkpoint on both losses; stopped at any moment, the same command continues."""
    run(load_recipe(recipe, MidtrainRecipe))
