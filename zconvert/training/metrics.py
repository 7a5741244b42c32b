"""What a run tells of its steps: sums since the last row of metrics, and the file that the rows go to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import add_line, write_file, writing
from zconvert.checkpoint.run_folder import METRICS_FILE
from zconvert.training.objective import expected_accepted


@dataclass
class Window:
    """Sums since the last row; a train state holds them, so that the next row does not depend on stops."""

    ar: float = 0.0
    diffusion: float = 0.0
    ar_count: int = 0
    diffusion_count: int = 0
    tokens: int = 0
    seconds: float = 0.0
    grad_norm: float = 0.0
    slot_correct: list[int] = field(default_factory=list)
    slot_count: list[int] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    """what observers said last"""

    @classmethod
    def of(cls, block_size: int) -> Window:
        """One that has seen nothing."""
        return cls(slot_correct=[0] * block_size, slot_count=[0] * block_size)

    def add(
        self,
        *,
        losses: tuple[float, float],
        counts: tuple[int, int],
        slots: list[int],
        grad_norm: float,
        tokens: int,
        seconds: float,
    ) -> None:
        """Takes a step in.

        Args:
            losses: sums of the AR and the diffusion loss, in nats.
            counts: tokens scored by each.
            slots: mask slots guessed right, by place in the block; then all of them, likewise.
            grad_norm: before clipping.
            tokens: in the rows, padding included.
            seconds: that it took.
        """
        self.ar, self.diffusion = self.ar + losses[0], self.diffusion + losses[1]
        self.ar_count, self.diffusion_count = self.ar_count + counts[0], self.diffusion_count + counts[1]
        sums = [a + b for a, b in zip([*self.slot_correct, *self.slot_count], slots, strict=True)]
        self.slot_correct, self.slot_count = sums[: len(sums) // 2], sums[len(sums) // 2 :]
        self.grad_norm = grad_norm
        self.tokens += tokens
        self.seconds += seconds

    def means(self, alpha: float) -> dict[str, Any]:
        """Means over the window.

        Args:
            alpha: weight of the AR loss.

        Returns:
            losses in nats a token, the accuracy of each place in the block, tokens a second.
        """
        ar = self.ar / max(1, self.ar_count)
        diffusion = self.diffusion / self.diffusion_count
        accuracy = [c / n if n else 0.0 for c, n in zip(self.slot_correct, self.slot_count, strict=True)]
        return {
            "loss": (alpha * ar + diffusion) / (1 + alpha),
            "loss_ar": ar,
            "loss_diffusion": diffusion,
            "slot_accuracy": accuracy,
            "expected_accepted": expected_accepted(accuracy),
            "grad_norm": self.grad_norm,
            "tokens_per_second": self.tokens / self.seconds,
            "seconds": self.seconds,
            **self.extras,
        }


@contextmanager
def metrics_file(run_dir: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """metrics.jsonl, open for appending, without the rows after `step`, whose steps will be done again.

    Args:
        run_dir: of the run.
        step: the last one that is done.

    Yields:
        what adds a row.

    Raises:
        UserError: the disk is full or not writable.
    """
    path = run_dir / METRICS_FILE
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break  # a line half-written when the power went: it and what follows will be written again
    write_file(path, "".join(line + "\n" for line in kept))
    with writing(path):
        # Unbuffered: every row is there as soon as it is told of, and a full disk is noticed at its row.
        file = path.open("ab", buffering=0)

    with file:
        yield lambda row: add_line(file, json.dumps(row))
