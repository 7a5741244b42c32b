"""Losses of tokens, summed, from hidden states and labels; the logits of more than a chunk are never held.

Where the output head is an ordinary linear layer, each chunk's logits are made once: its gradients with respect to
hidden states and head are computed along with its loss, in the forward pass, and the backward pass only scales them
(as in Liger-Kernel, arXiv 2410.10989). Heads of other kinds (sharded, quantised, grafted) make a chunk's logits again
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zconvert.planning.memory import CHUNK_LOGITS
from zconvert.tidar.model import LayoutModel

_Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""(logits, labels …) of a chunk, float32 -> () the summed loss, (n,) bool: the likeliest token is right, and the loss's
gradient with respect to the logits, in the logits' own memory"""


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

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        target = logits.gather(1, labels[:, None])[:, 0]
        normaliser, likeliest = _softmax_(logits)
        gradient = logits.scatter_add_(1, labels[:, None], logits.new_full((len(labels), 1), -1.0))
        return (normaliser - target).sum(), likeliest == labels, gradient

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

    def loss(logits: Tensor, teacher: Tensor, labels: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # KL = Σ p (log p - log q) = Σ p (their logits' difference) - normaliser of p + normaliser of q
        target = logits.gather(1, labels[:, None])[:, 0]
        differences = model.logits(teacher)
        p = differences.clone()
        normaliser_p, likeliest_p = _softmax_(p)
        expected = torch.linalg.vecdot(p, differences.sub_(logits)) - normaliser_p
        del differences
        normaliser_q, likeliest_q = _softmax_(logits)
        # At a start p is one at the label, and zero elsewhere.
        p.masked_fill_(starts[:, None], 0.0).scatter_add_(1, labels[:, None], starts[:, None].to(p.dtype))
        total = (normaliser_q + torch.where(starts, -target, expected)).sum()
        return total, likeliest_q == torch.where(starts, labels, likeliest_p), logits.sub_(p)

    return _chunked(model, loss, hidden, (teacher.detach(), labels, starts), chunk_size)


def variation_sum(
    model: LayoutModel,
    hidden: Tensor,
    teacher: Tensor,
    labels: Tensor,
    starts: Tensor,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed total variation of p and q in float32: the share of drafts that lossless decoding would reject.

    Args and results are those of `divergence_sum`, but for the sum's unit: it counts rejections.
    """

    def loss(logits: Tensor, teacher: Tensor, labels: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q = model.logits(teacher), logits
        (_, likeliest_p), (_, likeliest_q) = _softmax_(p), _softmax_(q)
        p.masked_fill_(starts[:, None], 0.0).scatter_add_(1, labels[:, None], starts[:, None].to(p.dtype))
        # Half the sum of |q - p|; with s half the sign of q - p its gradient is q (s - Σ q s).
        differences = q - p
        signs = differences.sign().mul_(0.5)
        total = torch.linalg.vecdot(differences, signs).sum()
        gradient = q.mul_(signs.sub_(torch.linalg.vecdot(q, signs)[:, None]))
        return total, likeliest_q == torch.where(starts, labels, likeliest_p), gradient

    return _chunked(model, loss, hidden, (teacher.detach(), labels, starts), chunk_size)


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turns (n, vocabulary) logits into probabilities in place; returns (n,) log-sum-exps and (n,) likeliest tokens."""
    top, likeliest = logits.max(-1)
    total = logits.sub_(top[:, None]).exp_().sum(-1)
    logits.div_(total[:, None])
    return total.log_().add_(top), likeliest


def _chunked(
    model: LayoutModel, loss: _Loss, hidden: Tensor, others: tuple[Tensor, ...], chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Sums a loss over chunks of `hidden` and of the other tensors of n rows."""
    size = chunk_size or max(1, CHUNK_LOGITS // model.config.vocab_size)
    head = model.linear_head
    if head is not None and torch.is_grad_enabled():
        return _LinearLoss.apply(hidden, head.weight, head.bias, model.finish_logits, loss, others, size)

    def chunk_loss(hidden: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return _LogitsLoss.apply(model.logits(hidden), loss, others)

    chunks = _chunks(hidden, others, size)
    if len(chunks) == 1 or not torch.is_grad_enabled():
        parts = [chunk_loss(*chunk) for chunk in chunks]
    else:
        parts = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack([part for part, _ in parts]).sum(), torch.cat([correct for _, correct in parts])


def _chunks(hidden: Tensor, others: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(size) for x in (hidden, *others)), strict=True))


class _LogitsLoss(torch.autograd.Function):
    """A loss of logits, which need not be kept for the backward pass: its gradient is."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: _Loss, others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Returns the sum and what is right."""
        total, correct, gradient = loss(logits.clone(), *others)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        """Scales the gradient."""
        return ctx.saved_tensors[0] * outputs[0], None, None


class _LinearLoss(torch.autograd.Function):
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
        of_bias = hidden.new_zeros(len(weight), dtype=torch.float32) if wants_bias else None
        buffer = hidden.new_empty((min(size, len(hidden)), len(weight)), dtype=dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        correct, start = [], 0
        for rows, *labels in _chunks(hidden, others, size):
            states = rows.to(dtype)
            with torch.autocast(device, enabled=False):
                raw = torch.mm(states, matrix.T, out=buffer[: len(rows)])
                if bias is not None:
                    raw += bias.to(dtype)
                with torch.enable_grad():
                    logits = finish(raw.requires_grad_().float())
                part, right, gradient = loss(logits.detach(), *labels)
                by_raw = gradient if logits is raw else torch.autograd.grad(logits, raw, gradient)[0]
                raw.requires_grad_(False)
                if of_hidden is not None:
                    of_hidden[start : start + len(rows)] = by_raw @ matrix
                if of_weight is not None and dtype == torch.float32:
                    of_weight.addmm_(by_raw.T, states)
                elif of_weight is not None:
                    of_weight += by_raw.T @ states
                if of_bias is not None:
                    of_bias += by_raw.sum(0, dtype=torch.float32)
            del logits, gradient, by_raw
            total += part
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
