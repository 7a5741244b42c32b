"""Learning-rate schedules: a factor of the peak rate for every step. Pure arithmetic."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "wsd"]


def learning_rate_factor(
    step: int, *, schedule: Schedule, max_steps: int, warmup_steps: int, decay_steps: int, min_lr_ratio: float
) -> float:
    """Linear warm-up, then the schedule.

    Args:
        step: from 0.
        schedule: constant; cosine down to the end; or warmup-stable-decay, linear over the last `decay_steps`.
        max_steps: of the run.
        warmup_steps: the rate rises over so many steps.
        decay_steps: length of the final decay of `wsd`, in steps.
        min_lr_ratio: the factor at the end.

    >>> rates = dict(max_steps=10, warmup_steps=2, decay_steps=4, min_lr_ratio=0.0)
    >>> [learning_rate_factor(s, schedule="wsd", **rates) for s in (0, 1, 5, 6, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    into_decay = step - (max_steps - decay_steps)
    return 1.0 - (1 - min_lr_ratio) * max(0, into_decay) / max(1, decay_steps)
