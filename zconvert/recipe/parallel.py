"""The `parallel:` section of a training recipe: how the processes that a launcher started share the work."""

from __future__ import annotations

from pydantic import Field

from zconvert.recipe.sections import Count, Section


class ParallelRecipe(Section):
    """How weights, experts and rows are spread over the processes; one process needs none of it."""

    fsdp: Count | None = Field(
        None,
        description="processes that weights, gradients and optimizer are sharded over; where there are more, they form "
        "replicas (HSDP), so that 1 is plain data parallelism; null: all",
    )
    context_parallel: Count = Field(1, description="neighbouring processes that share each row's tokens")
    expert_parallel: Count = Field(
        1, description="processes that share a layer's experts, each whole on one; divides fsdp"
    )
    sync_every_forward: bool = Field(
        False,
        description="sum gradients after every forward instead of once a step: more traffic, but no process holds the "
        "whole model's gradient while it accumulates",
    )
