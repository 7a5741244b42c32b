"""Recipes: one YAML file a stage, checked whole before anything is loaded. Each setting is defined here, once.

    recipe = load_recipe(Path("recipes/quickstart/midtrain.yaml"), MidtrainRecipe)

Paths in a recipe are relative to the folder where the command runs.
"""

from zconvert.recipe.convert_init import ConvertInitRecipe
from zconvert.recipe.data import DatasetRecipe, SelfGeneratedRecipe
from zconvert.recipe.extend_context import ExtendContextRecipe
from zconvert.recipe.loading import (
    BY_STAGE,
    dump_recipe,
    load_pipeline,
    load_recipe,
    load_stages,
)
from zconvert.recipe.parallel import ParallelRecipe
from zconvert.recipe.pipeline import PipelineRecipe
from zconvert.recipe.sections import Recipe
from zconvert.recipe.task import TaskRecipe
from zconvert.recipe.training import MidtrainRecipe, SftRecipe, TrainingRecipe

__all__ = [
    "BY_STAGE",
    "ConvertInitRecipe",
    "DatasetRecipe",
    "ExtendContextRecipe",
    "MidtrainRecipe",
    "ParallelRecipe",
    "PipelineRecipe",
    "Recipe",
    "SelfGeneratedRecipe",
    "SftRecipe",
    "TaskRecipe",
    "TrainingRecipe",
    "dump_recipe",
    "load_pipeline",
    "load_recipe",
    "load_stages",
]
