"""Loss-free balancing (arXiv 2408.15664): biases on routers' scores step against each expert's excess load.

ZAYA and the kin of DeepSeek V3 choose experts by score plus such a bias. Transformers keeps the biases and moves them
never; a training step must.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zconvert.training.routing import Router

DEFAULT_RATE = 1e-3


class BiasBalancer:
    """Moves the biases of a model's routers."""

    def __init__(self, routers: Sequence[Router], rate: float) -> None:
        """Takes the routers, of which only those with biases are moved, and the step."""
        self.routers, self.rate = routers, rate

    @torch.no_grad()
    def step(self, counts: Sequence[Tensor]) -> None:
        """One step by the choices of one optimizer step, the same on every process.

        Args:
            counts: for each router (2, classes), summed over processes; clean tokens and mask slots weigh alike.
        """
        for router, of_kinds in zip(self.routers, counts, strict=True):
            if router.bias is None:
                continue
            # The class that skips a layer is no expert: its bias stays where its own training left it.
            load = of_kinds.sum(0)[: of_kinds.shape[1] - router.skips].float()
            router.bias[: len(load)] -= self.rate * torch.sign(load - load.mean()).to(router.bias.dtype)
