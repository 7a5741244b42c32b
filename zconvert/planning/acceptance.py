"""How many tokens a forward yields: from how often each slot of a block is right, for any set of proposals.

Symbols as in the method: B block size, n tokens accepted of a forward (1 … B), a proposal for the accepted count k.
`rates[j]` is the probability that a draft from slot j of a block is accepted, given that those before it were; slot 0
is the anchor, whose token is known.

A step that accepted n takes the block planned for the largest k ≤ n. Its slot `o = n − k` is the anchor, and the next
drafts come from slots o + 1 … B − 1: fewer of them, and from slots further away. So o is the state of a Markov chain,
and tokens per forward are its long-run mean. With every count planned o is always 0, and the mean is
`1 + a_1 + a_1 a_2 + …`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from zconvert.checkpoint.run_folder import METRICS_FILE
from zconvert.errors import UserError
from zconvert.tidar.settings import MAX_BLOCK_SIZE

PUBLISHED = {
    "tidar-1.5b": (7.45, "TiDAR 1.5B (arXiv 2511.08923)"),
    "tidar-8b": (8.25, "TiDAR 8B (arXiv 2511.08923)"),
    "zyphra-lossless": (4.6, "ZAYA1-8B-Diffusion-Preview, lossless (Zyphra)"),
    "zyphra-mixed": (7.7, "ZAYA1-8B-Diffusion-Preview, logit mixing (Zyphra)"),
    "zyphra-greedy": (10.06, "ZAYA1-8B-Diffusion-Preview, greedy at batch 1 (Zyphra)"),
}
"""tokens per forward as published, with blocks of 16"""
DEFAULT_CURVE = "zyphra-lossless"
_STEPS = 24  # of the chain, from its best state: the mean stands still to 1e-4 well before


@dataclass(frozen=True)
class Curve:
    """How often slots are right: `rates[j]` for slot j, and where this comes from."""

    rates: tuple[float, ...]
    source: str

    @property
    def block_size(self) -> int:
        """B."""
        return len(self.rates)

    def cut(self, block_size: int) -> Curve:
        """The same slots in a smaller block."""
        return Curve(self.rates[:block_size], self.source)


@dataclass(frozen=True)
class Yield:
    """What a set of proposals gives in the long run."""

    proposals: tuple[int, ...]
    accepted: float
    """tokens a forward yields"""
    tokens: float
    """tokens a forward processes, for each sequence"""
    causal: float
    """those among them that are drafts, or the token before them; the others are mask slots"""


def flat_curve(accepted: float, block_size: int) -> Curve:
    """The curve with one rate for all slots that yields so many tokens per forward.

    Raises:
        UserError: no rate does.

    >>> round(flat_curve(7.5, 16).rates[1], 3)
    0.886
    """
    if not 1 <= accepted <= block_size:
        raise UserError(
            "the accepted tokens per forward cannot be",
            found=accepted,
            expected=f"1 to {block_size}, the block size",
            fix="give tokens per forward as bench and metrics.jsonl count them, or another --block-size",
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if sum(rate**k for k in range(block_size)) < accepted else (low, rate)
    return Curve((1.0, *[(low + high) / 2] * (block_size - 1)), f"{accepted:g} tokens per forward")


def find_curve(text: str, block_size: int) -> Curve:
    """A curve from what a user typed.

    Args:
        text: tokens per forward (`7.5`), a published one's name, or a run (its folder, or its metrics.jsonl).
        block_size: B, for those that are a number.

    Raises:
        UserError: it is none of these, or the file has no curve.
    """
    if text in PUBLISHED:
        accepted, source = PUBLISHED[text]
        # Published with blocks of 16: in other blocks the same slots are right as often.
        rate = flat_curve(accepted, 16).rates[1]
        return Curve((1.0, *[rate] * (block_size - 1)), source)
    try:
        return flat_curve(float(text), block_size)
    except ValueError:
        path = Path(text)
    path = path / METRICS_FILE if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--accepted {text} is no acceptance curve",
            found=error.strerror if isinstance(error, OSError) else error,
            expected=f"a number, one of {', '.join(PUBLISHED)}, or a run's folder",
            fix="choose one of these",
        ) from None
    told = (row.get("slot_accuracy") for row in reversed(rows) if isinstance(row, dict))
    measured = next(filter(None, told), None)
    slots = measured[1:] if isinstance(measured, list) else []
    if not 1 <= len(slots) < MAX_BLOCK_SIZE or not all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in slots):
        raise UserError(
            f"{path} has no slot_accuracy",
            found=None if measured is None else f"{measured!r:.100}",
            expected="metrics.jsonl of a training run, with a share for each slot of a block",
            fix="give the folder of a run that has logged a step",
        )
    return Curve((1.0, *map(float, slots)), f"slot accuracy of {path}")


@lru_cache(maxsize=4096)
def yield_of(rates: tuple[float, ...], proposals: tuple[int, ...]) -> Yield:
    """What a set of proposals gives in the long run.

    Args:
        rates: of the slots of a block, B of them.
        proposals: accepted counts that get a block.

    >>> rates = (1.0, 0.5, 0.5)
    >>> yield_of(rates, (1, 2, 3)).accepted
    1.75
    >>> yield_of(rates, (1,)).accepted < 1.75
    True
    """
    size = len(rates)
    moves = [_moves(rates, proposals, anchor) for anchor in range(size)]
    state = [1.0] + [0.0] * (size - 1)
    for step in range(2 * _STEPS):
        following = [0.0] * size
        for share, targets in zip(state, moves, strict=True):
            if share > 1e-9:
                for target, chance, _ in targets:
                    following[target] += share * chance
        moved = sum(abs(a - b) for a, b in zip(state, following, strict=True))
        # Halves of two steps: a chain that alternates settles too.
        state = following if step < _STEPS else [(a + b) / 2 for a, b in zip(state, following, strict=True)]
        if moved < 1e-6:
            break
    accepted = sum(share * chance * n for share, ts in zip(state, moves, strict=True) for _, chance, n in ts)
    causal = sum(share * (size - anchor) for anchor, share in enumerate(state))
    blocks = sum(share * len(_planned(proposals, size - anchor)) for anchor, share in enumerate(state))
    return Yield(proposals, accepted, causal + size * blocks, causal)


@lru_cache(maxsize=64)
def best_sets(rates: tuple[float, ...]) -> tuple[Yield, ...]:
    """For each number of proposals, 1 … B, a set of them that yields most, found by adding the best count each time.

    Args:
        rates: of the slots of a block, B of them.
    """
    size = len(rates)
    chosen: tuple[int, ...] = ()
    found = []
    for _ in range(size):
        sets = [tuple(sorted((*chosen, count))) for count in range(1, size + 1) if count not in chosen]
        best = max((yield_of(rates, each) for each in sets), key=lambda each: each.accepted)
        found.append(best)
        chosen = best.proposals
    return tuple(found)


def two_forwards(rates: Sequence[float]) -> Yield:
    """One forward verifies, a second one drafts after the token that is known then: every draft starts at slot 1.

    The drafting forward reads that token too, and so yields one more by plain AR. Of both together.
    """
    size, accepted, chain = len(rates), 2.0, 1.0
    for rate in rates[1:]:
        chain *= rate
        accepted += chain
    return Yield((), accepted, 2 * size + 1, size + 1)


def _planned(proposals: tuple[int, ...], causal: int) -> tuple[int, ...]:
    """Counts that get a block in a forward over so many causal tokens, as DecodePlan.blocks plans them."""
    return tuple(k for k in proposals if k <= causal) or (1,)


def _moves(rates: tuple[float, ...], proposals: tuple[int, ...], anchor: int) -> list[tuple[int, float, int]]:
    """(next anchor, probability, tokens accepted) of a step whose drafts come from the slots behind `anchor`."""
    size = len(rates)
    planned, chain = _planned(proposals, size - anchor), 1.0
    moves = []
    for n in range(1, size - anchor + 1):
        reached = chain
        chain *= rates[anchor + n] if anchor + n < size else 0.0
        usable = [k for k in planned if k <= n]
        # Without a block there are no drafts, as behind a block's last slot.
        target = min(n - usable[-1], size - 1) if usable else size - 1
        moves.append((target, reached - chain, n))
    return moves
