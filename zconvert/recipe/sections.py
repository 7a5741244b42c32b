"""What every recipe is made of: checked sections, and the keys that all stages have."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A mapping in a recipe; its keys are known, and its values are of the right kind."""

    # Strict: `"8"` is no number and 1 is no boolean; a wrong type is more often a slip than a wish.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


class RecipeFile(Section):
    """A whole file."""

    stage: ClassVar[str]
    """what it is a recipe of"""


class Recipe(RecipeFile):
    """What every stage's recipe has; `stage` is the command that takes it."""

    base_model: Text = Field(description="checkpoint to start from: a local folder, a run's folder or a Hub id")
    revision: Text | None = Field(None, description="Hub branch, tag or commit of base_model; null: its main branch")
    output_dir: Text = Field(description="folder to write; convert-init refuses one that exists")
    seed: CountOrZero = Field(0, lt=2**32, description="seed of everything random in the stage")
