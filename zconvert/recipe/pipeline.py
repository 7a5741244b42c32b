"""A pipeline: the recipes of several stages, run one after another by `zconvert run`."""

from __future__ import annotations

from pydantic import Field, model_validator

from zconvert.recipe.sections import RecipeFile, Section, Text

STAGES = ("convert-init", "midtrain", "extend-context", "sft", "export")
"""in the order in which they are run"""


class ExportRecipe(Section):
    """The `export:` section: the folder to hand on, made of the last stage's checkpoint."""

    output_dir: Text = Field(description="folder to write; its name titles the card")


class PipelineRecipe(RecipeFile):
    """Recipe of `zconvert run`: files beside it, each the recipe of the stage it stands under."""

    stage = "pipeline"

    convert_init: Text | None = Field(None, alias="convert-init", description="recipe of convert-init")
    midtrain: Text | None = Field(None, description="recipe of midtrain")
    extend_context: Text | None = Field(None, alias="extend-context", description="recipe of extend-context")
    sft: Text | None = Field(None, description="recipe of sft")
    export: ExportRecipe | None = Field(None, description="the folder to hand on; null: none is made")

    @model_validator(mode="after")
    def _has_stages(self) -> PipelineRecipe:
        if not self.files():
            raise ValueError(f"expected at least one of {', '.join(STAGES[:-1])}")
        return self

    def files(self) -> dict[str, str]:
        """Stage -> file of its recipe, in the order in which they are run."""
        found = {stage: getattr(self, stage.replace("-", "_"), None) for stage in STAGES[:-1]}
        return {stage: name for stage, name in found.items() if name is not None}
