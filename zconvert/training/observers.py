"""What may look on at a run, and add to its loss and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from zconvert.training.loop import Trainer


class Observer:
    """Base of what looks on at a run; each part does nothing until overridden."""

    def extra_loss(self) -> Tensor | None:
        """() a term to add to the loss of the forward that was just done, a mean; called once after each forward."""
        return None

    def on_step(self, trainer: Trainer) -> dict[str, Any] | None:
        """Called after each step, in every process; what it returns goes into the next row of metrics.

        Args:
            trainer: `trainer.step` is the number of steps done, `trainer.logs_now` whether this step has a row.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a run that continues needs: numbers, text, tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
