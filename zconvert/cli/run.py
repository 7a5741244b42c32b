"""`zconvert run`: the stages of a pipeline, one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from zconvert.cli import convert_init, extend_context
from zconvert.cli.export import export_shown
from zconvert.cli.training import run_shown
from zconvert.cli.ui import err, out

if TYPE_CHECKING:
    from zconvert.recipe import Recipe
    from zconvert.training.pipeline import Stage, Status


def command(
    pipeline: Annotated[
        Path,
        typer.Argument(
            metavar="PIPELINE.yaml",
            help="Names the recipe of each stage; `zconvert recipes copy` has some to begin with.",
        ),
    ],
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take outputs that were not made by `run` as made from these recipes.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell which stages are complete and which would run; run nothing.")
    ] = False,
) -> None:
    """Run a pipeline's stages one after another.

    Stages that are complete and unchanged are skipped, an interrupted one goes on; where inputs changed, it says which.
    """
    from zconvert.recipe import PipelineRecipe, load_pipeline, load_recipe
    from zconvert.training.pipeline import export_stage, run_pipeline, stage_of

    recipes = load_pipeline(pipeline)
    stages = [stage_of(recipe, _runner(recipe)) for _, recipe in recipes]
    export = load_recipe(pipeline, PipelineRecipe).export
    if export is not None:
        base, output = recipes[-1][1].output_dir, Path(export.output_dir).expanduser()
        stages.append(export_stage(base, output, lambda: export_shown(base, output, verify=True)))

    told: list[Stage] = []

    def tell(stage: Stage, status: Status) -> None:
        told.append(stage)
        words = {"complete": "complete and unchanged, skipped", "begun": "goes on", "missing": "runs"}
        err.print(Text.assemble((stage.name, "bold"), f" → {stage.output}: {words[status]}"), soft_wrap=True)

    run_pipeline(stages, tell, adopt=adopt, dry_run=dry_run)
    if not dry_run:
        out.print(Text(str(stages[-1].output)), soft_wrap=True)
    for stage in stages[len(told) :]:  # a dry run ends where a stage would run
        err.print(Text.assemble((stage.name, "bold"), f" → {stage.output}: after it"), soft_wrap=True)


def _runner(recipe: Recipe) -> Callable[[], None]:
    from zconvert.recipe import ConvertInitRecipe, ExtendContextRecipe, TrainingRecipe

    if isinstance(recipe, ConvertInitRecipe):
        return lambda: convert_init.run_recipe(recipe)
    assert isinstance(recipe, TrainingRecipe)

    def train() -> None:
        run_shown(recipe)
        if isinstance(recipe, ExtendContextRecipe):
            extend_context.show_context(Path(recipe.output_dir))

    return train
