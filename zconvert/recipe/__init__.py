"""Recipes: one YAML file a stage, checked whole before anything is loaded. Each setting is defined here, once.

    recipe = load_recipe(Path("recipes/quickstart/midtrain.yaml"), MidtrainRecipe)

Paths in a recipe are relative to the folder where the command runs.
"""

from zconvert.recipe.convert_init import ConvertInitRecipe
from zconvert.recipe.data import DatasetRecipe
from zconvert.recipe.loading import dump_recipe, load_checked, load_recipe, load_training_recipe
from zconvert.recipe.sections import Recipe
from zconvert.recipe.training import MidtrainRecipe, TrainingRecipe

__all__ = [
    "ConvertInitRecipe",
    "DatasetRecipe",
    "MidtrainRecipe",
    "Recipe",
    "TrainingRecipe",
    "dump_recipe",
    "load_checked",
    "load_recipe",
    "load_training_recipe",
]
