"""`zconvert midtrain`: diffusion mid-training by a recipe."""

from __future__ import annotations

from zconvert.cli.launch import TorchrunOptions, launch
from zconvert.cli.training import RecipeFile, run


def command(recipe: RecipeFile, torchrun: TorchrunOptions = None) -> None:
    """Train a converted checkpoint on both losses; stopped at any moment, the same command continues."""
    from zconvert.recipe import MidtrainRecipe, load_recipe

    settings = load_recipe(recipe, MidtrainRecipe)
    if torchrun:
        launch([settings.stage, str(recipe)], torchrun)
    run(settings)
