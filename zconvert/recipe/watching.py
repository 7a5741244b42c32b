"""Sections of a training recipe about what is watched during a run: experts, held-out rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from zconvert.recipe.data import DatasetRecipe
from zconvert.recipe.sections import Count, CountOrZero, Section, Share


class MoeSection(Section):
    """The `moe:` section of a training recipe: routers, and how they are kept healthy."""

    router: Literal["train", "freeze"] = Field(
        "train", description="freeze: routers stay as they are, their balancing biases too"
    )
    aux_loss_coef: float | None = Field(
        None,
        ge=0,
        description="weight of the load-balancing loss over clean tokens and mask slots; null: config.json's",
    )
    balancing_rate: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="step by which a router's balancing biases move against an expert's excess load at each optimizer "
        "step; 0: never; null: 0.001 where routers have such biases (ZAYA, DeepSeek V3 and its kin)",
    )
    probe_steps: CountOrZero = Field(
        100, description="steps between measurements of how far routing has drifted from base_model's; 0: never"
    )
    collapse_warning: Share = Field(
        0.25, description="warn where mask slots spread over less than this share of what clean tokens do; 0: never"
    )

    @field_validator("aux_loss_coef", "balancing_rate")
    @classmethod
    def _nothing_moves_a_frozen_router(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value and info.data.get("router") == "freeze":
            raise ValueError("expected null or 0, since moe.router is freeze")
        return value


class EvaluationSection(Section):
    """The `evaluation:` section of a training recipe: measurements on held-out documents during the run."""

    datasets: list[DatasetRecipe] = Field([], description="held-out documents; none: no evaluation")
    steps: Count = Field(500, description="steps between evaluations; the last step has one too")
    rows: Count = Field(32, description="packed rows on which the losses are measured, fewer where there is less data")
    prompts: CountOrZero = Field(4, description="documents whose beginning is decoded on, for the measured acceptance")
    prompt_tokens: Count = Field(32, description="tokens of a prompt at most; never more than half a document")
    new_tokens: Count = Field(64, ge=2, description="tokens decoded for a prompt at most")
