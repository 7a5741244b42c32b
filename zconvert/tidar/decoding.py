"""What a decoding is asked for and what it gives: plans, requests, steps, results. The loop is in engine.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .acceptance import Sampling
from .settings import TidarSettings, check_proposals


@dataclass(frozen=True)
class DecodePlan:
    """How forwards draft, and how tokens are chosen where a request does not say."""

    mask_token_id: int
    """never sampled; fills the mask slots"""
    block_size: int
    """tokens a forward can yield at most; 1: plain AR decoding"""
    proposals: tuple[int, ...]
    """accepted counts that get a block of mask slots; empty: plain AR decoding"""
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_ids: frozenset[int] = frozenset()
    """tokens that end a text"""
    two_forwards: bool = False
    """drafts are made and verified in forwards of their own, in turn: fewer tokens in a forward, twice the forwards"""
    bigrams: bool = True
    """drafts are chosen from left to right with the checkpoint's bigrams, where it has them"""
    draft_temperature: float = 0.5
    """of the temperature: drafts nearer to the likeliest tokens are accepted more often (docs/log.md)"""

    @classmethod
    def tidar(
        cls,
        settings: TidarSettings,
        sampling: Sampling,
        eos_token_ids: frozenset[int],
        *,
        proposals: tuple[int, ...] | None = None,
        block_size: int | None = None,
        two_forwards: bool = False,
    ) -> DecodePlan:
        """Decoding with drafts, by the checkpoint's settings where the caller says nothing.

        Raises:
            ValueError: a block larger than trained, or proposals out of range.
        """
        size = settings.block_size if block_size is None else block_size
        if not 2 <= size <= settings.block_size:
            raise ValueError(f"block_size is {size}, expected 2 to {settings.block_size}, the size it was trained with")
        if two_forwards:
            if proposals not in (None, (1,)):
                raise ValueError(f"proposals are {proposals} with two forwards: a block always follows the next token")
            proposals = (1,)
        if proposals is None:
            proposals = tuple(k for k in settings.default_proposals() if k <= size) or (size,)
        checked = check_proposals(proposals, size)
        return cls(settings.mask_token_id, size, checked, sampling, eos_token_ids, two_forwards)

    @classmethod
    def autoregressive(cls, mask_token_id: int, sampling: Sampling, eos_token_ids: frozenset[int]) -> DecodePlan:
        """One token a forward, through the same loop and cache."""
        return cls(mask_token_id, 1, (), sampling, eos_token_ids)

    def drafting(self, sampling: Sampling) -> Sampling:
        """How drafts are drawn for a text whose tokens are chosen so."""
        return replace(sampling, temperature=sampling.temperature * self.draft_temperature)

    def blocks(self, num_drafts: int, left: int) -> tuple[int, ...]:
        """Accepted counts to plan a block for, of those that can come to pass in a row's next forward.

        After n tokens a draft has a use only if two more are wanted: itself and the token after it. Where the set has
        none that fits (no drafts, so that n = 1, and 1 is not in the set), 1 stands in: else decoding would go on
        without drafts.

        Args:
            num_drafts: that the forward verifies.
            left: tokens that are still wanted.
        """
        if not self.proposals or left <= 2 or (self.two_forwards and num_drafts):
            return ()
        return tuple(k for k in self.proposals if k <= min(num_drafts + 1, left - 2)) or (1,)

    def shape(self, *, drafted: bool) -> tuple[int, tuple[int, ...]]:
        """Most drafts that a forward can have to verify, and the accepted counts that it can have to plan for.

        Args:
            drafted: of a forward that has any to verify, which only the first of a text has not; with two forwards,
                every other one.
        """
        if not self.proposals or (self.two_forwards and not drafted):
            return 0, self.proposals
        return self.block_size - 1, () if self.two_forwards else self.proposals


@dataclass(frozen=True)
class Request:
    """A prompt to go on from."""

    prompt: list[int]
    """token ids, at least one"""
    max_new_tokens: int
    """at least 1"""
    sampling: Sampling | None = None
    """None: the plan's"""
    seed: int | None = None
    """of the text's own random numbers, which nothing else in the batch draws from; None: any"""
    eos_token_ids: frozenset[int] | None = None
    """None: the plan's"""
    stop: Callable[[list[int]], int | None] | None = None
    """gets all new tokens after each forward; says how many of them are the whole text, or None to go on"""
    key: Any = None
    """the caller's own name for it"""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty: give at least one token (a BOS token will do)")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")


@dataclass(frozen=True)
class Step:
    """What one forward gave a text."""

    tokens: tuple[int, ...]
    """new text, cut at the end of the text or of the length; a forward's accepted drafts, then the token after them"""
    accepted: int
    """n of the method: drafts accepted and the token they follow, 1 … block_size; 0 for the prefill"""
    tokens_in_forward: int
    """tokens the forward processed for this text"""
    finish: str | None = None
    """why the text ended with it, see Result; None: it goes on"""


@dataclass(eq=False)
class Result:
    """A request's text, which grows while the engine runs."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """new tokens, an end token included"""
    finish: str | None = None
    """`eos` (an end token), `length`, `stop` (the request's own) or `cancelled`; None: not done"""
    accepted: list[int] = field(default_factory=list)
    """of each forward after the prefill, see Step"""

    @property
    def forwards(self) -> int:
        """Forwards after the prefill that the text took part in."""
        return len(self.accepted)
