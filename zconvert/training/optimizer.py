"""The optimizer of a training stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zconvert.recipe import TrainingRecipe


def make_optimizer(named_parameters: Iterable[tuple[str, Tensor]], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """AdamW with the recipe's settings; matrices are decayed, norms, biases and scales are not.

    Args:
        named_parameters: what is trained.
        recipe: of the stage.
    """
    groups: dict[Any, list[Tensor]] = {}
    for _, p in named_parameters:
        # A group's parameters are updated together, which those of several meshes (experts have their own) cannot be.
        groups.setdefault((p.ndim >= 2, getattr(p, "device_mesh", None)), []).append(p)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": recipe.weight_decay if matrices else 0.0}
            for (matrices, _), parameters in groups.items()
        ],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )
