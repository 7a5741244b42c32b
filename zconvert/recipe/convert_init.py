"""The recipe of `zconvert convert-init`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, ValidationInfo, field_validator

from zconvert.recipe.sections import Count, CountOrZero, Recipe, Section, Text
from zconvert.tidar.settings import DEFAULT_BLOCK_SIZE, DEFAULT_MASK_INIT, MAX_BLOCK_SIZE, GatedParts, check_proposals


class GatedSection(Section):
    """The `gated:` section of a convert-init recipe: which weights act at mask slots, and how large they are."""

    rank: CountOrZero = Field(GatedParts.rank, description="rank of the updates of attention projections; 0: none")
    mlp: Literal["none", "add", "replace"] = Field(
        GatedParts.mlp,
        description="what the diffusion expert does at mask slots: replace the routed experts, add to them",
    )
    mlp_width: Count = Field(GatedParts.mlp_width, description="hidden units of the diffusion expert")
    norms: bool = Field(GatedParts.norms, description="a scale and a shift after every norm over hidden states")
    router: bool = Field(
        GatedParts.router, description="a shift of what routers see; only where mlp is not replace: else no router runs"
    )
    mask_embedding: bool = Field(GatedParts.mask_embedding, description="mask slots have an embedding of their own")

    @field_validator("router")
    @classmethod
    def _routers_run(cls, router: bool, info: ValidationInfo) -> bool:
        if router and info.data.get("mlp") == "replace":
            raise ValueError("expected false, since mlp is replace and no router runs there")
        return router


class ConvertInitDiffusion(Section):
    """The `diffusion:` section of a convert-init recipe."""

    mode: Literal["full", "gated"] = Field(
        "full", description="full: every weight is trained; gated: the source stays as it is, small weights are added"
    )
    gated: GatedSection = Field(GatedSection(), description="the added weights of mode gated")

    block_size: int = Field(
        DEFAULT_BLOCK_SIZE,
        ge=2,
        le=MAX_BLOCK_SIZE,
        validation_alias=AliasChoices("block_size", "block_length"),
        description="tokens per diffusion block",
    )
    mask_token: Annotated[Text | CountOrZero, Field(union_mode="left_to_right")] | None = Field(
        None,
        description="mask token, by text or id; null: an existing one, else a spare row, else a new row; in mode gated "
        "with a mask_embedding a virtual one, which needs no row and leaves the tokenizer alone",
    )
    mask_init: str = Field(
        DEFAULT_MASK_INIT,
        pattern=r"^(mean|zero|random|copy:.+)$",
        description="start value of the mask token's row: mean, zero, random or copy:<token>",
    )
    proposals: list[Count] | None = Field(
        None, description="accepted counts that get a proposal block in decoding; null: all, 1 to block_size"
    )

    @field_validator("proposals")
    @classmethod
    def _within_the_block(cls, proposals: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if proposals is None or "block_size" not in info.data:
            return proposals
        return list(check_proposals(tuple(proposals), info.data["block_size"]))


class ConvertInitRecipe(Recipe):
    """Recipe of `zconvert convert-init`."""

    stage = "convert-init"

    diffusion: ConvertInitDiffusion = Field(ConvertInitDiffusion(), description="what makes it a diffusion model")
