"""The recipe of `zconvert extend-context`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from zconvert.recipe.sections import Count, Section, Share, Text
from zconvert.recipe.training import TrainingRecipe


class ContextSection(Section):
    """The `context:` section: how long the context becomes, and how positions reach that far."""

    target_len: Count = Field(description="tokens of context afterwards")
    original_len: Count | None = Field(
        None, description="tokens of context that base_model was trained with; null: as its config.json says"
    )
    rope: Literal["theta", "linear", "yarn"] = Field(
        "theta",
        description="theta: a larger base of the rotary frequencies; linear: positions divided by the factor; "
        "yarn: divided for slow frequencies only",
    )
    rope_theta: float | None = Field(
        None, gt=1, description="the base with rope: theta; null: stretches the slowest frequency by the factor"
    )
    attention_factor: float | None = Field(
        None, gt=0, description="scale of attention with rope: yarn; null: 0.1 · ln(factor) + 1; 1.0 turns it off"
    )
    layer_types: list[Text] | None = Field(
        None,
        min_length=1,
        description="layer types whose positions change, where each has its own; null: those that see everything",
    )
    long_share: Share = Field(
        0.5, description="least share of training tokens from documents longer than original_len; others are left out"
    )
    buckets: Count = Field(8, description="equal parts of target_len for which losses are reported before and after")
    report_documents: Count = Field(16, description="longest documents on which that is measured")

    @field_validator("rope_theta", "attention_factor")
    @classmethod
    def _of_its_method(cls, value: float | None, info: ValidationInfo) -> float | None:
        method = {"rope_theta": "theta", "attention_factor": "yarn"}[str(info.field_name)]
        if value is not None and info.data.get("rope", method) != method:
            raise ValueError(f"expected null, since context.rope is {info.data['rope']}")
        return value


class ExtendContextRecipe(TrainingRecipe):
    """Recipe of `zconvert extend-context`."""

    stage = "extend-context"

    context: ContextSection = Field(description="how far the context is extended, and how")

    @field_validator("context")
    @classmethod
    def _rows_within_the_context(cls, context: ContextSection, info: ValidationInfo) -> ContextSection:
        length = info.data.get("sequence_len")
        if length is not None and length > context.target_len:
            raise ValueError(f"expected target_len of at least sequence_len, {length}")
        if length is not None and context.original_len is not None and length <= context.original_len:
            raise ValueError(
                f"expected original_len below sequence_len, {length}: rows no longer teach no more context"
            )
        return context
