"""p, q and drafts -> how many drafts are accepted, and the token after them. Pure tensors.

Speculative sampling (arXiv 2211.17192, 2302.01318): a draft d drawn from q is accepted with probability
min(1, p(d) / q(d)); on the first rejection the token there is drawn from norm(max(p - q, 0)). The tokens are then
distributed exactly as if each had been drawn from p. Logit mixing verifies against another p; the algebra is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


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

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 <= self.mix_weight <= 1:
            raise ValueError(f"mix_weight is {self.mix_weight}, expected 0 to 1")

    @property
    def greedy(self) -> bool:
        """Every distribution is a point mass at its highest logit."""
        return self.temperature == 0


@dataclass(frozen=True)
class Drafts:
    """m tokens proposed by diffusion for the m positions after the next token."""

    tokens: Tensor
    """(m,) int64"""
    probs: Tensor | None
    """(m, V) float32: q, what each token was drawn from; None where greedy"""
    logits: Tensor | None
    """(m, V) float32, kept for mixing; None where lossless"""


@torch.no_grad()
def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(n, V) float32 logits -> (n, V) float32 probabilities after temperature, top-k and top-p, as transformers does.

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
    return warpers(None, logits).softmax(-1)  # type: ignore[arg-type]  # warpers never read the ids


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws one token from each row of (n, V) probabilities: (n,) int64."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def make_drafts(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Drafts:
    """Draws drafts from (m, V) diffusion logits."""
    kept = logits if sampling.mix_weight < 1 else None
    if sampling.greedy:
        return Drafts(logits.argmax(-1), None, kept)
    probs = probabilities(logits, sampling)
    return Drafts(draw(probs, generator), probs, kept)


@torch.no_grad()
def verify(
    logits: Tensor, drafts: Drafts | None, sampling: Sampling, generator: torch.Generator | None
) -> tuple[int, Tensor]:
    """Verifies drafts from left to right.

    Args:
        logits: (m + 1, V) AR logits: row j is for the position of draft j, the last for the position after them.
        drafts: m of them; None for m = 0.
        sampling: how the target distribution is made. Mixing applies to the rows that have a draft.
        generator: of the random numbers.

    Returns:
        How many drafts are accepted, 0 … m, and the token that follows them, () int64.
    """
    if drafts is not None and drafts.logits is not None:
        mixed = sampling.mix_weight * logits[:-1] + (1 - sampling.mix_weight) * drafts.logits
        # Where both are -inf (suppressed), so is the mixture; 0 · -inf would be NaN.
        logits = torch.cat([mixed.masked_fill(mixed.isnan(), -torch.inf), logits[-1:]])
    if sampling.greedy:
        targets = logits.argmax(-1)
        count = 0 if drafts is None else int((targets[:-1] == drafts.tokens).cumprod(0).sum())
        return count, targets[count]
    probs = probabilities(logits, sampling)
    if drafts is None:
        return 0, draw(probs, generator)[0]
    assert drafts.probs is not None
    return accept(probs, drafts.probs, drafts.tokens, generator)


@torch.no_grad()
def accept(p: Tensor, q: Tensor, tokens: Tensor, generator: torch.Generator | None) -> tuple[int, Tensor]:
    """The lossless rule.

    Args:
        p: (m + 1, V) target probabilities.
        q: (m, V) what the drafts were drawn from.
        tokens: (m,) the drafts.
        generator: of the random numbers.

    Returns:
        How many drafts are accepted, and the token that follows them.
    """
    chosen = tokens.unsqueeze(-1)
    ratio = p[:-1].gather(-1, chosen).squeeze(-1) / q.gather(-1, chosen).squeeze(-1)
    uniform = torch.rand(ratio.shape, generator=generator, device=p.device)
    count = int((uniform < ratio).cumprod(0).sum())
    target = p[count : count + 1]
    if count < len(tokens):
        residual = (target - q[count : count + 1]).clamp_min(0)
        # Rejection has probability 0 where p = q; rounding must not leave nothing to draw from.
        target = torch.where(residual.sum() > 0, residual, target)
    return count, draw(target, generator)[0]
