"""What a stage needs, looked at before anything takes time: where it writes, its data, its checkpoint. No torch."""

from __future__ import annotations

from pathlib import Path

from zconvert.checkpoint.run_folder import RUN_CHECKPOINT
from zconvert.checkpoint.source import Source, naming_the_recipe, require_converted, resolve
from zconvert.data.reading import require_datasets
from zconvert.errors import UserError
from zconvert.recipe import TrainingRecipe


def check_inputs(recipe: TrainingRecipe) -> None:
    """Refuses a recipe that cannot be run here; no weights are fetched, and the Hub is asked for base_model alone.

    Raises:
        UserError: the run is complete, data are not there, or base_model is no converted checkpoint.
    """
    refuse_output(Path(recipe.output_dir))
    require_data(recipe)
    require_converted(base_of(recipe, weights=False))


def require_data(recipe: TrainingRecipe) -> None:
    """Refuses a recipe whose data should be on this machine, and are not.

    Raises:
        UserError: some are not.
    """
    require_datasets([*recipe.datasets, *recipe.evaluation.datasets])


def base_of(recipe: TrainingRecipe, *, weights: bool = True) -> Source:
    """The checkpoint that a recipe starts from."""
    with naming_the_recipe(recipe.base_model):
        return resolve(recipe.base_model, revision=recipe.revision, weights=weights)


def refuse_output(run_dir: Path) -> None:
    """Refuses an output_dir that nothing can or may be added to."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(
            f"output_dir {run_dir} is a file", expected="a folder, new or of this run", fix="choose another name"
        )
    final = run_dir / RUN_CHECKPOINT
    if final.exists():
        raise UserError(
            f"{final} exists already: this run is complete",
            fix="choose another output_dir; to train further, remove that folder and raise max_steps",
        )
