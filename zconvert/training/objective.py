"""The two losses of a packed row: next-token on the clean half, block diffusion on the mask half.

`loss = (alpha · CE_AR + CE_diff) / (1 + alpha)`. A clean logit i predicts the token after it, a mask logit i its own
token. Losses are sums over scored tokens; the caller divides by the count over its whole step, so that the result does
not depend on how a step is cut into micro-batches. Source: TiDAR (arXiv 2511.08923), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zconvert.data.packing import Batch
from zconvert.tidar.layout import PADDING, packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.training.context_parallel import ContextParallel


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
    """(R, T) bool: this token is scored"""

    @classmethod
    def of(cls, batch: Batch) -> Targets:
        """Scored tokens of a batch: `loss_mask`, never padding, nothing across documents."""
        scored = batch.loss_mask & (batch.document_ids != PADDING)
        follows = torch.zeros_like(scored)
        follows[:, :-1] = scored[:, 1:] & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
        return cls(follows, scored)


def packed_losses(
    model: LayoutModel,
    batch: Batch,
    *,
    mask_token_id: int,
    block_size: int,
    offset: Tensor | int = 0,
    objective: Literal["data", "forward_kl"] = "data",
    loss_chunk_size: int = 1024,
    context: ContextParallel | None = None,
) -> LossSums:
    """Runs one packed forward of 2T tokens and sums both losses.

    Args:
        model: see LayoutModel.
        batch: R rows of T tokens, on the model's device.
        mask_token_id: fills the mask half.
        block_size: B.
        offset: phase of the blocks; see `packed_layout`.
        objective: of mask slots. data: cross-entropy with their own token. forward_kl: KL divergence of their
            distribution from the AR one of the same position, which is held fixed; the first token of a document,
            which AR does not predict, is learnt from the data.
        loss_chunk_size: logits are made for so many tokens at a time.
        context: the processes that share the rows; each then sums over its own tokens.

    Returns:
        Sums, not means. With forward_kl a slot is right where its likeliest token is AR's.
    """
    ids, length = batch.input_ids, batch.input_ids.shape[1]
    layout = packed_layout(batch.document_ids, block_size, offset)
    row = torch.cat([ids, torch.full_like(ids, mask_token_id)], dim=1)  # (R, 2T)
    targets = Targets.of(batch)
    next_ids, clean = F.pad(ids[:, 1:], (0, 1)), length
    shard = None if context is None else context.shard(layout)
    if shard is not None:
        layout, row, clean = shard.layout, row.gather(1, shard.columns), shard.num_clean
        targets = Targets(shard.of_clean(targets.ar), shard.of_slots(targets.diffusion))
        next_ids, ids = shard.of_clean(next_ids), shard.of_slots(ids)
    hidden = model.hidden_states(row, layout, shard=shard)
    ar, _ = cross_entropy_sum(model, hidden[:, :clean][targets.ar], next_ids[targets.ar], loss_chunk_size)
    slot_hidden, labels = hidden[:, clean:][targets.diffusion], ids[targets.diffusion]
    if objective == "data":
        diffusion, correct = cross_entropy_sum(model, slot_hidden, labels, loss_chunk_size)
    else:
        states = hidden[:, :clean].detach()
        before = F.pad(states[:, :-1], (0, 0, 1, 0)) if shard is None else shard.before_slots(states)
        starts = (layout.position_ids[:, clean:] == 0)[targets.diffusion]
        diffusion, correct = divergence_sum(
            model, slot_hidden, before[targets.diffusion], labels, starts, loss_chunk_size
        )
    slots = (layout.position_ids - layout.clean_limit)[:, clean:][targets.diffusion]
    return LossSums(
        ar=ar,
        diffusion=diffusion,
        slot_correct=torch.bincount(slots[correct], minlength=block_size),
        slot_count=torch.bincount(slots, minlength=block_size),
    )


def cross_entropy_sum(model: LayoutModel, hidden: Tensor, labels: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in float32, without ever holding the logits of more than a chunk.

    A chunk's logits are made again in the backward pass (activation checkpointing) where there is more than one.

    Args:
        model: its head is used.
        hidden: (n, hidden).
        labels: (n,) int64.
        chunk_size: tokens in a chunk.

    Returns:
        () the sum, and (n,) bool: the likeliest token is the label.
    """

    def chunk_loss(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.logits(hidden)
        return F.cross_entropy(logits, labels, reduction="sum"), logits.detach().argmax(-1) == labels

    if len(labels) <= chunk_size:
        return chunk_loss(hidden, labels)
    parts = [
        checkpoint(chunk_loss, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    ]
    return torch.stack([loss for loss, _ in parts]).sum(), torch.cat([correct for _, correct in parts])


def divergence_sum(
    model: LayoutModel, hidden: Tensor, teacher: Tensor, labels: Tensor, starts: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Summed KL(p || q) in float32, p the AR distribution, without ever holding the logits of more than a chunk.

    Args:
        model: its head is used.
        hidden: (n, hidden) of mask slots, which give q.
        teacher: (n, hidden) of the clean tokens before them, which give p.
        labels: (n,) int64, the data's tokens.
        starts: (n,) bool: the slot is its document's first; its p is the data's token.
        chunk_size: tokens in a chunk.

    Returns:
        () the sum, and (n,) bool: the likeliest token is p's.
    """

    def chunk_loss(hidden: Tensor, teacher: Tensor, labels: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        q = model.logits(hidden).log_softmax(-1)
        with torch.no_grad():
            p = model.logits(teacher).softmax(-1)
            p = torch.where(starts[:, None], F.one_hot(labels, p.shape[-1]), p)
        return F.kl_div(q, p, reduction="sum"), q.detach().argmax(-1) == p.argmax(-1)

    chunks = zip(*(x.split(chunk_size) for x in (hidden, teacher, labels, starts)), strict=True)
    parts = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack([loss for loss, _ in parts]).sum(), torch.cat([correct for _, correct in parts])


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
