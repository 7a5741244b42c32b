"""The decode loop: one forward verifies the drafts of the step before and drafts the next block.

A step's forward holds `[next token, its drafts | a block of mask slots for each accepted count it plans for]`. The
drafts are verified; the block planned for the accepted count (or the nearest below) holds the next drafts. Plain AR
decoding is the same loop without drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .acceptance import Drafts, Sampling, make_drafts, verify
from .cache import TidarCache
from .layout import decode_layout
from .model import LayoutModel
from .settings import TidarSettings, check_proposals


@dataclass(frozen=True)
class DecodePlan:
    """What a decoding does at each step, whatever the prompt."""

    mask_token_id: int
    """never sampled; fills the mask slots"""
    block_size: int
    """tokens a forward can yield at most; 1: plain AR decoding"""
    proposals: tuple[int, ...]
    """accepted counts that get a block of mask slots; empty: plain AR decoding"""
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_ids: frozenset[int] = frozenset()
    """tokens that end the text"""

    @classmethod
    def tidar(
        cls,
        settings: TidarSettings,
        sampling: Sampling,
        eos_token_ids: frozenset[int],
        *,
        proposals: tuple[int, ...] | None = None,
        block_size: int | None = None,
    ) -> DecodePlan:
        """Single-forward decoding, by the checkpoint's settings where the caller says nothing.

        Raises:
            ValueError: a block larger than trained, or proposals out of range.
        """
        size = settings.block_size if block_size is None else block_size
        if not 2 <= size <= settings.block_size:
            raise ValueError(f"block_size is {size}, expected 2 to {settings.block_size}, the size it was trained with")
        if proposals is None:
            proposals = tuple(k for k in settings.default_proposals() if k <= size) or (size,)
        return cls(settings.mask_token_id, size, check_proposals(proposals, size), sampling, eos_token_ids)

    @classmethod
    def autoregressive(cls, mask_token_id: int, sampling: Sampling, eos_token_ids: frozenset[int]) -> DecodePlan:
        """One token a forward, through the same loop and cache."""
        return cls(mask_token_id, 1, (), sampling, eos_token_ids)


@dataclass(frozen=True)
class Step:
    """What one forward gave."""

    tokens: tuple[int, ...]
    """new text, cut at the end of the text or of the length; a forward's accepted drafts, then the token after them"""
    accepted: int
    """n of the method: drafts accepted and the token they follow, 1 … block_size; 0 for the prefill"""
    tokens_in_forward: int
    """tokens the forward processed"""


@torch.inference_mode()
def decode(
    model: LayoutModel,
    prompt: list[int],
    plan: DecodePlan,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Decodes one sequence.

    Args:
        model: of a converted checkpoint (any supported one for plain AR decoding).
        prompt: token ids, at least one.
        plan: see DecodePlan.
        max_new_tokens: at most so many tokens; at least 1.
        generator: of the random numbers, on the model's device; None uses torch's global one.

    Yields:
        The prefill's step, then one for each forward, until an end token or the length.

    Raises:
        ValueError: empty prompt, or max_new_tokens below 1.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token (a BOS token will do)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    cache = TidarCache()
    left = max_new_tokens
    causal, drafts, num_verified = prompt, None, 0  # in prefill nothing is verified: the prompt is given
    proposals: tuple[int, ...] = (len(prompt),) if plan.proposals and left > 2 else ()
    while True:
        forward = _forward(model, cache, causal, proposals, plan)
        first = len(causal) - 1 - num_verified  # hidden state that predicts the first draft's position
        logits = _text_logits(model, forward.hidden[first : len(causal)], plan)
        accepted, following = verify(logits, drafts, plan.sampling, generator)
        kept = first + 1 + accepted
        cache.commit(kept)
        new = [*causal[first + 1 : kept], int(following)]
        step = _cut(new, left, plan, accepted=accepted + 1 if cache.committed > len(prompt) else 0, forward=forward)
        left -= len(step.tokens)
        yield step
        if left == 0 or step.tokens[-1] in plan.eos_token_ids:
            return
        drafts = _next_drafts(model, forward, kept, left, plan, generator)
        num_verified = 0 if drafts is None else len(drafts.tokens)
        causal = [new[-1], *([] if drafts is None else drafts.tokens.tolist())]
        proposals = _plan_blocks(plan, len(causal), left)


@dataclass(frozen=True)
class _Forward:
    hidden: Tensor  # (N, hidden)
    num_causal: int
    proposals: tuple[int, ...]


def _forward(
    model: LayoutModel, cache: TidarCache, causal: list[int], proposals: tuple[int, ...], plan: DecodePlan
) -> _Forward:
    layout = decode_layout(cache.committed, len(causal), proposals, plan.block_size, model.device)
    ids = causal + [plan.mask_token_id] * (plan.block_size * len(proposals))
    hidden = model.hidden_states(torch.tensor([ids], device=model.device), layout, cache)
    return _Forward(hidden[0], len(causal), proposals)


def _plan_blocks(plan: DecodePlan, num_causal: int, left: int) -> tuple[int, ...]:
    """Accepted counts to plan a block for, of those that can come to pass.

    After n tokens a draft has a use only if two more are wanted: itself and the token after it. Where the set has none
    that fits (no drafts, so that n = 1, and 1 is not in the set), 1 stands in: decoding would go on without drafts.
    """
    if not plan.proposals or left <= 2:
        return ()
    return tuple(k for k in plan.proposals if k <= min(num_causal, left - 2)) or (1,)


def _text_logits(model: LayoutModel, hidden: Tensor, plan: DecodePlan) -> Tensor:
    """(n, hidden) -> (n, V) float32 logits in which the mask token cannot be chosen."""
    logits = model.logits(hidden)
    logits[:, plan.mask_token_id : plan.mask_token_id + 1] = -torch.inf  # a virtual one has no column
    return logits


def _next_drafts(
    model: LayoutModel, forward: _Forward, kept: int, left: int, plan: DecodePlan, generator: torch.Generator | None
) -> Drafts | None:
    """Drafts from the block planned for the largest accepted count that is not above `kept`.

    Its slot `kept - k` stands at the position of the token after the accepted ones (the anchor): that token is exact
    already, so the slot's prediction is dropped. The slots after it are the next drafts.
    """
    usable = [i for i, k in enumerate(forward.proposals) if k <= kept]
    if not usable:
        return None
    anchor = kept - forward.proposals[usable[-1]]
    start = forward.num_causal + usable[-1] * plan.block_size
    # A forward yields one token more than its accepted drafts: drafts past the length would be thrown away.
    slots = forward.hidden[start + anchor + 1 : start + min(plan.block_size, anchor + left)]
    if len(slots) == 0:
        return None
    return make_drafts(_text_logits(model, slots, plan), plan.sampling, generator)


def _cut(new: list[int], left: int, plan: DecodePlan, *, accepted: int, forward: _Forward) -> Step:
    tokens = new[:left]
    for i, token in enumerate(tokens):
        if token in plan.eos_token_ids:
            tokens = tokens[: i + 1]
            break
    return Step(tuple(tokens), accepted, len(forward.hidden))
