"""Losses of tokens, summed, from hidden states and labels; the logits of more than a chunk are never held.

Where the output head is an ordinary linear layer, each chunk's logits are made once: its gradients with respect to hidden
states and head are computed along with its loss, in the forward pass, and the backward pass only scales them (as in
Liger-Kernel, arXiv 2410.10989). Heads of other kinds (sharded, quantised, grafted) make a chunk's logits again in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zconvert.tidar.model import LayoutModel

_Loss = Callable[..., tuple[Tensor, Tensor]]
"""(logits, labels …) of a chunk, float32 -> () the summed loss, and (n,) bool: the likeliest token is right"""

CHUNK_LOGITS = 2**27
"""logits in a chunk of no stated size: half a GiB in float32, of which up to four are held at a time"""


def cross_entropy_sum(
    model: LayoutModel, hidden: Tensor, labels: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, in float32.

    Args:
        model: its head is used.
        hidden: (n, hidden).
        labels: (n,) int64.
        chunk_size: tokens in a chunk; None for as many as make CHUNK_LOGITS logits.

    Returns:
        () the sum in nats, and (n,) bool: the likeliest token is the label.
    """

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(logits, labels, reduction="sum"), logits.detach().argmax(-1) == labels

    return _chunked(model, loss, hidden, (labels,), chunk_size)


def divergence_sum(
    model: LayoutModel,
    hidden: Tensor,
    teacher: Tensor,
    labels: Tensor,
    starts: Tensor,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed KL(p || q) in float32, p the AR distribution, which is held fixed.

    Args:
        model: its head is used.
        hidden: (n, hidden) of mask slots, which give q.
        teacher: (n, hidden) of the clean tokens before them, which give p.
        labels: (n,) int64, the data's tokens.
        starts: (n,) bool: the slot is its document's first; its p is the data's token.
        chunk_size: tokens in a chunk; None for as many as make CHUNK_LOGITS logits.

    Returns:
        () the sum in nats, and (n,) bool: the likeliest token is p's.
    """

    def loss(logits: Tensor, teacher: Tensor, labels: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            p = model.logits(teacher).softmax(-1).masked_fill_(starts[:, None], 0.0)
            p.scatter_add_(1, labels[:, None], starts[:, None].to(p.dtype))
        q = logits.log_softmax(-1)
        return F.kl_div(q, p, reduction="sum"), q.detach().argmax(-1) == p.argmax(-1)

    return _chunked(model, loss, hidden, (teacher.detach(), labels, starts), chunk_size)


def _chunked(
    model: LayoutModel, loss: _Loss, hidden: Tensor, others: tuple[Tensor, ...], chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Sums a loss over chunks of `hidden` and of the other tensors of n rows."""
    size = chunk_size or max(1, CHUNK_LOGITS // model.config.vocab_size)
    head = model.linear_head
    if head is not None and torch.is_grad_enabled():
        return _Fused.apply(hidden, head.weight, head.bias, model.finish_logits, loss, others, size)  # type: ignore[no-any-return]

    def chunk_loss(hidden: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return loss(model.logits(hidden), *others)

    chunks = _chunks(hidden, others, size)
    if len(chunks) == 1 or not torch.is_grad_enabled():
        parts = [chunk_loss(*chunk) for chunk in chunks]
    else:
        parts = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack([part for part, _ in parts]).sum(), torch.cat([correct for _, correct in parts])


def _chunks(hidden: Tensor, others: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(size) for x in (hidden, *others)), strict=True))


class _Fused(torch.autograd.Function):
    """A loss of `finish(hidden @ weight.T + bias)`, whose gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        finish: Callable[[Tensor], Tensor],
        loss: _Loss,
        others: tuple[Tensor, ...],
        size: int,
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum and what is right; the gradients wait in `ctx`."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix = weight.to(dtype)  # once, and not for every chunk
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # Sums over chunks are taken in float32, whatever the products are made in.
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        of_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wants_bias else None
        total = hidden.new_zeros((), dtype=torch.float32)
        correct, start = [], 0
        for rows, *labels in _chunks(hidden, others, size):
            states = rows.to(dtype)
            with torch.autocast(device, enabled=False):
                raw = F.linear(states, matrix, None if bias is None else bias.to(dtype)).requires_grad_()
                with torch.enable_grad():
                    part, right = loss(finish(raw.float()), *labels)
                    (by_logit,) = torch.autograd.grad(part, raw)
                del raw
                if of_hidden is not None:
                    of_hidden[start : start + len(rows)] = by_logit @ matrix
                if of_weight is not None and dtype == torch.float32:
                    of_weight.addmm_(by_logit.T, states)
                elif of_weight is not None:
                    of_weight += by_logit.T @ states
                if of_bias is not None:
                    of_bias += by_logit.sum(0, dtype=torch.float32)
            total += part.detach()
            correct.append(right)
            start += len(rows)
        ctx.gradients = (of_hidden, of_weight, of_bias)
        ctx.dtype = weight.dtype
        rights = torch.cat(correct)
        ctx.mark_non_differentiable(rights)
        return total, rights

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        """Scales the gradients, in place: they are as large as the head."""
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps no graph: its backward pass can run once")
        of_hidden, of_weight, of_bias = ctx.gradients
        ctx.gradients = None  # so that the leaf takes the tensor itself, not a copy
        scale: Tensor = outputs[0]
        of_hidden = None if of_hidden is None else of_hidden.mul_(scale)
        of_weight, of_bias = (None if g is None else g.mul_(scale).to(ctx.dtype) for g in (of_weight, of_bias))
        return of_hidden, of_weight, of_bias, None, None, None, None
