"""The two losses of a packed row: next-token on the clean half, block diffusion on the mask half.

`loss = (alpha · CE_AR + CE_diff) / (1 + alpha)`. A clean logit i predicts the token after it, a mask logit i its own
token. Losses are sums over scored tokens; the caller divides by the count over its whole step, so that the result does
not depend on how a step is cut into micro-batches. Source: TiDAR (arXiv 2511.08923), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zconvert.tidar.cache import CleanStates
from zconvert.tidar.layout import NO_SLOT, PADDING, Layout, PackedLayout, packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.training.context_parallel import ContextParallel
from zconvert.training.loss import cross_entropy_sum, divergence_sum, variation_sum

if TYPE_CHECKING:  # the losses run where what reads recipes and data is not installed (benchmarks/step_time.py)
    from zconvert.data.packing import Batch


@dataclass
class LossSums:
    """Sums over the scored tokens of some rows; add two to get those of both."""

    ar: Tensor
    """() summed cross-entropy of next-token prediction, nats; carries the gradient"""
    diffusion: Tensor
    """() summed cross-entropy of mask slots, nats; carries the gradient"""
    slot_correct: Tensor
    """(B,) mask slots whose likeliest token is right, by place in the block"""
    slot_count: Tensor
    """(B,) mask slots scored, by place in the block"""


@dataclass(frozen=True)
class Targets:
    """What is scored in a batch, known before any forward."""

    ar: Tensor
    """(R, T) bool: the token after this one is scored, and belongs to the same document"""
    diffusion: Tensor
    """(R, M) bool: the token of this mask slot is scored"""

    @classmethod
    def of(cls, batch: Batch, slots: Tensor | None = None) -> Targets:
        """Scored tokens of a batch: `loss_mask`, never padding, nothing across documents.

        Args:
            batch: of R rows of T tokens.
            slots: (R, M), the tokens that have a mask slot; None for all, M = T.
        """
        scored = scored_tokens(batch)
        follows = torch.zeros_like(scored)
        follows[:, :-1] = scored[:, 1:] & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
        return cls(follows, _at(scored, slots) if slots is None else _at(scored, slots) & (slots != NO_SLOT))


def scored_tokens(batch: Batch) -> Tensor:
    """(R, T) bool: the token counts as a target."""
    return batch.loss_mask & (batch.document_ids != PADDING)


def _at(values: Tensor, slots: Tensor | None) -> Tensor:
    """(R, T, …) of the tokens -> (R, M, …) of the slots; anything where there is none."""
    if slots is None:
        return values
    index = slots.clamp_min(0)
    return values.gather(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:]))


def packed_losses(
    model: LayoutModel,
    batch: Batch,
    *,
    mask_token_id: int,
    block_size: int,
    offset: Tensor | int = 0,
    slots: Tensor | None = None,
    objective: Literal["data", "forward_kl", "total_variation"] = "data",
    loss_chunk_size: int | None = None,
    context: ContextParallel | None = None,
) -> LossSums:
    """Runs packed rows of T + M tokens and sums both losses.

    Args:
        model: see LayoutModel.
        batch: R rows of T tokens, on the model's device.
        mask_token_id: fills the mask half.
        block_size: B.
        offset: phase of the blocks; see `packed_layout`.
        slots: (R, M), the tokens that have a mask slot (`draw_slots`); None for all.
        objective: of mask slots. data: cross-entropy with their own token. forward_kl: KL divergence of their
            distribution from the AR one of the same position, which is held fixed; the first token of a document,
            which AR does not predict, is learnt from the data. total_variation: half the sum of their differences.
        loss_chunk_size: logits are made for so many tokens at a time; None: see training/loss.py.
        context: the processes that share the rows; each then sums over its own tokens.

    Returns:
        Sums, not means. With forward_kl a slot is right where its likeliest token is AR's.
    """
    ids, length = batch.input_ids, batch.input_ids.shape[1]
    whole = packed_layout(batch.document_ids, block_size, offset, slots)
    layout: Layout = whole
    slot_ids, targets, next_ids = _at(ids, slots), Targets.of(batch, slots), F.pad(ids[:, 1:], (0, 1))
    shard = None if context is None else context.shard(whole)
    if shard is None:
        clean, masked = hidden_halves(model, ids, torch.full_like(slot_ids, mask_token_id), whole)
    else:
        row = torch.cat([ids, torch.full_like(slot_ids, mask_token_id)], dim=1).gather(1, shard.columns)
        hidden = model.hidden_states(row, shard.layout, shard=shard)
        clean, masked = hidden[:, : shard.num_clean], hidden[:, shard.num_clean :]
        layout, length = shard.layout, shard.num_clean
        targets = Targets(shard.of_clean(targets.ar), shard.of_slots(targets.diffusion))
        next_ids, slot_ids = shard.of_clean(next_ids), shard.of_slots(slot_ids)
    ar, _ = cross_entropy_sum(model, clean[targets.ar], next_ids[targets.ar], loss_chunk_size)
    slot_hidden, labels = masked[targets.diffusion], slot_ids[targets.diffusion]
    if objective == "data":
        diffusion, correct = cross_entropy_sum(model, slot_hidden, labels, loss_chunk_size)
    else:
        states = clean.detach()
        before = _at(F.pad(states[:, :-1], (0, 0, 1, 0)), slots) if shard is None else shard.before_slots(states)
        starts = (layout.position_ids[:, length:] == 0)[targets.diffusion]
        distance = divergence_sum if objective == "forward_kl" else variation_sum
        diffusion, correct = distance(model, slot_hidden, before[targets.diffusion], labels, starts, loss_chunk_size)
    places = (layout.position_ids - layout.clean_limit)[:, length:][targets.diffusion]
    return LossSums(
        ar=ar,
        diffusion=diffusion,
        slot_correct=torch.bincount(places[correct], minlength=block_size),
        slot_count=torch.bincount(places, minlength=block_size),
    )


def hidden_halves(model: LayoutModel, ids: Tensor, masked_ids: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Hidden states of the clean and of the mask half of packed rows.

    With gated weights the clean half is the frozen source: its keys and values are constants of the mask half, so that
    it runs first, without gradients, and keeps nothing else. Otherwise both are one forward.

    Args:
        model: see LayoutModel.
        ids: (R, T) int64.
        masked_ids: (R, M), the mask token everywhere.
        layout: of the packed rows, (R, T + M).

    Returns:
        (R, T, hidden) and (R, M, hidden), after the final norm.
    """
    if model.gated is None:
        hidden = model.hidden_states(torch.cat([ids, masked_ids], dim=1), layout)
        return hidden[:, : ids.shape[1]], hidden[:, ids.shape[1] :]
    states, (clean_layout, slot_layout) = CleanStates(), layout.halves()
    with torch.no_grad():
        clean = model.hidden_states(ids, clean_layout, states)
    states.complete = True
    return clean, model.hidden_states(masked_ids, slot_layout, states, layout)


def expected_accepted(slot_accuracy: list[float]) -> float:
    """Tokens a forward yields if each slot's draft is right with its measured accuracy, independently.

    The first slot is the anchor: its token is known. n = 1 + a_1 + a_1·a_2 + …

    >>> expected_accepted([0.9, 0.5, 0.5])
    1.75
    """
    total, chain = 1.0, 1.0
    for accuracy in slot_accuracy[1:]:
        chain *= accuracy
        total += chain
    return total
