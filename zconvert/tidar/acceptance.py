"""p, q and drafts -> how many drafts are accepted, and the token after them. Pure tensors, all rows at once.

Speculative sampling (arXiv 2211.17192, 2302.01318): a draft d drawn from q is accepted with probability
min(1, p(d) / q(d)); on the first rejection the token there is drawn from norm(max(p - q, 0)). The tokens are then
distributed exactly as if each had been drawn from p. Logit mixing verifies against another p; the algebra is the same.

Random numbers come in as uniform numbers in [0, 1), so that each row can have a source of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .bigram import CANDIDATES, WEIGHT, Bigrams


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    """0: all tokens"""
    top_p: float = 1.0
    """1: all tokens"""
    mix_weight: float = 1.0
    """w of the verifying distribution softmax(w · AR + (1 - w) · diffusion logits); 1: lossless"""
    min_p: float = 0.0
    """0: all tokens; else those with at least this share of the likeliest token's probability"""
    repetition_penalty: float = 1.0
    """1: none; logits of tokens in the prompt or the text are divided by it (multiplied where negative)"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 <= self.mix_weight <= 1:
            raise ValueError(f"mix_weight is {self.mix_weight}, expected 0 to 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, expected 0 (off) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, expected more than 0 (1: none)")

    @property
    def greedy(self) -> bool:
        """Every distribution is a point mass at its highest logit."""
        return self.temperature == 0


@dataclass(frozen=True)
class Drafts:
    """Tokens proposed by diffusion for the positions after the next token, R rows of up to m."""

    tokens: Tensor
    """(R, m) int64"""
    counts: Tensor
    """(R,) int64: how many of a row's tokens are drafts, from the left; the rest is filling"""
    probs: Tensor | None = None
    """(R, m, V) float32: q, what each token was drawn from; None where greedy"""
    logits: Tensor | None = None
    """(R, m, V) float32, kept for mixing; None where lossless"""


@torch.no_grad()
def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(…, V) float32 logits -> (…, V) float32 probabilities, cut as transformers does: top-k, then top-p, then min-p.

    >>> probabilities(torch.tensor([[0.0, 1.0, 2.0]]), Sampling(temperature=1.0, top_k=1)).tolist()
    [[0.0, 0.0, 1.0]]
    """
    if sampling.greedy:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(min_p=sampling.min_p))
    rows = logits.reshape(-1, logits.shape[-1])
    return warpers(None, rows).softmax(-1).view(logits.shape)  # type: ignore[arg-type]  # warpers never read the ids


@torch.no_grad()
def penalised(logits: Tensor, seen: Tensor, penalty: float, drafts: Tensor | None = None) -> Tensor:
    """Applies a repetition penalty, as transformers does for the text before each position.

    Args:
        logits: (R, n, V), of positions one after another.
        seen: (R, V) bool: the token stands in the text before the first of them.
        penalty: see Sampling.
        drafts: (R, n - 1) int64: the tokens that stand between these positions; None where that is not known yet.

    Returns:
        (R, n, V).
    """

    def lowered(values: Tensor) -> Tensor:
        return torch.where(values < 0, values * penalty, values / penalty)

    out = torch.where(seen[:, None], lowered(logits), logits)
    if drafts is None or drafts.shape[1] == 0:
        return out
    count = drafts.shape[1]
    # At position j the drafts before it count too: (R, j, i) whether draft i's token is among the first j drafts.
    same = drafts[:, :, None] == drafts[:, None, :]
    before = torch.ones(count + 1, count, dtype=torch.bool, device=logits.device).tril(-1)
    among = (before.float() @ same.float()) > 0
    tokens = drafts[:, None].expand(-1, count + 1, -1)
    return out.scatter(2, tokens, torch.where(among, lowered(logits.gather(2, tokens)), out.gather(2, tokens)))


@torch.no_grad()
def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draws a token from each of (…, V) probabilities by its (…) uniform number: (…) int64.

    >>> draw(torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([0.5])).tolist()
    [2]
    """
    # Where the running sum passes the number. In float64, since in float32 rare tokens would vanish in the sum.
    running = probs.double().cumsum(-1)
    total = running[..., -1:]
    token = torch.searchsorted(running, uniform.double()[..., None] * total, right=True)
    last = torch.searchsorted(
        running, total.contiguous()
    )  # the last token with a probability, should rounding go past it
    return torch.minimum(token, last).squeeze(-1)


@torch.no_grad()
def make_drafts(
    logits: Tensor,
    counts: Tensor,
    sampling: Sampling,
    uniform: Tensor | None,
    bigrams: Bigrams | None = None,
    previous: Tensor | None = None,
) -> Drafts:
    """Draws drafts.

    Args:
        logits: (R, m, V) of mask slots; suppressed tokens are -inf.
        counts: (R,) how many of a row's slots are wanted.
        sampling: how q is made.
        uniform: (R, m) numbers in [0, 1); None where greedy.
        bigrams: draws from left to right, with what a token makes likelier after it; None: slots by themselves.
        previous: (R,) the token before the first slot, for `bigrams`.
    """
    if bigrams is not None and previous is not None:
        return _drafts_from_left_to_right(logits, counts, sampling, uniform, bigrams, previous)
    kept = logits if sampling.mix_weight < 1 else None
    if sampling.greedy:
        return Drafts(logits.argmax(-1), counts, None, kept)
    assert uniform is not None
    probs = probabilities(logits, sampling)
    return Drafts(draw(probs, uniform), counts, probs, kept)


def _drafts_from_left_to_right(
    logits: Tensor,
    counts: Tensor,
    sampling: Sampling,
    uniform: Tensor | None,
    bigrams: Bigrams,
    previous: Tensor,
) -> Drafts:
    top, candidates = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)  # (R, m, K)
    tokens, probs, biased = [], [], []
    for slot in range(logits.shape[1]):
        here, own = candidates[:, slot], top[:, slot] + WEIGHT * bigrams.of(previous, candidates[:, slot])
        if not sampling.greedy or sampling.mix_weight < 1:
            biased.append(logits[:, slot].scatter(1, here, own))
        if sampling.greedy:
            previous = here.gather(1, own.argmax(-1, keepdim=True)).squeeze(1)
        else:
            assert uniform is not None
            probs.append(probabilities(biased[-1], sampling))
            previous = draw(probs[-1], uniform[:, slot])
        tokens.append(previous)
    return Drafts(
        torch.stack(tokens, dim=1),
        counts,
        torch.stack(probs, dim=1) if probs else None,
        torch.stack(biased, dim=1) if sampling.mix_weight < 1 else None,
    )


@torch.no_grad()
def verify(
    logits: Tensor, drafts: Drafts | None, sampling: Sampling, uniform: Tensor | None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Verifies drafts from left to right.

    Args:
        logits: (R, m + 1, V) AR logits: column j is for the position of draft j, the last for the position after them.
        drafts: m a row; None for m = 0.
        sampling: how the target distribution is made. Mixing applies to the columns that have a draft.
        uniform: (R, m + 1) numbers in [0, 1): one for each draft, one for the token after them; None where greedy.
        seen: (R, V) bool, the tokens of the text so far; only a repetition penalty reads it.

    Returns:
        (R,) how many drafts are accepted, 0 … m, and (R,) the token that follows them.
    """
    if drafts is not None and drafts.logits is not None:
        mixed = sampling.mix_weight * logits[:, :-1] + (1 - sampling.mix_weight) * drafts.logits
        # Where both are -inf (suppressed), so is the mixture; 0 · -inf would be NaN. Filling is not mixed.
        mixed = mixed.masked_fill(mixed.isnan(), -torch.inf)
        mixed = torch.where(_counted(drafts)[..., None], mixed, logits[:, :-1])
        logits = torch.cat([mixed, logits[:, -1:]], dim=1)
    if sampling.repetition_penalty != 1:
        assert seen is not None
        logits = penalised(logits, seen, sampling.repetition_penalty, None if drafts is None else drafts.tokens)
    if sampling.greedy:
        targets = logits.argmax(-1)
        if drafts is None:
            return torch.zeros_like(targets[:, 0]), targets[:, 0]
        right = (targets[:, :-1] == drafts.tokens) & _counted(drafts)
        accepted = right.long().cumprod(1).sum(1)
        return accepted, targets.gather(1, accepted[:, None]).squeeze(1)
    assert uniform is not None
    probs = probabilities(logits, sampling)
    if drafts is None:
        return torch.zeros_like(probs[:, 0, 0], dtype=torch.long), draw(probs[:, 0], uniform[:, 0])
    assert drafts.probs is not None
    return accept(probs, drafts.probs, drafts.tokens, drafts.counts, uniform)


@torch.no_grad()
def accept(p: Tensor, q: Tensor, tokens: Tensor, counts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The lossless rule.

    Args:
        p: (R, m + 1, V) target probabilities.
        q: (R, m, V) what the drafts were drawn from.
        tokens: (R, m) the drafts.
        counts: (R,) how many of them count.
        uniform: (R, m + 1) numbers in [0, 1).

    Returns:
        (R,) how many drafts are accepted, and (R,) the token that follows them.
    """
    chosen = tokens.unsqueeze(-1)
    ratio = p[:, :-1].gather(-1, chosen).squeeze(-1) / q.gather(-1, chosen).squeeze(-1)
    drafts = Drafts(tokens, counts)
    accepted = ((uniform[:, :-1] < ratio) & _counted(drafts)).long().cumprod(1).sum(1)
    row = torch.arange(len(p), device=p.device)
    target = p[row, accepted]
    residual = (target - q[row, accepted.clamp_max(q.shape[1] - 1)]).clamp_min(0)
    # Rejection has probability 0 where p = q; rounding must not leave nothing to draw from.
    rejected = (accepted < counts) & (residual.sum(-1) > 0)
    return accepted, draw(torch.where(rejected[:, None], residual, target), uniform[:, -1])


def _counted(drafts: Drafts) -> Tensor:
    """(R, m) bool: no filling."""
    return torch.arange(drafts.tokens.shape[1], device=drafts.tokens.device) < drafts.counts[:, None]
