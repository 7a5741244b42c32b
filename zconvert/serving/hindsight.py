"""What another plan would have made of the same text: drafts from every place of it, scored once it is known.

Rates of slots alone do not tell how plans differ: rejections fall where a text is hard, so that a small set of
proposals starts its blocks at other places than a large one. Here a text that was decoded is read once more, with a
block of mask slots behind each of its tokens. That says how many drafts would have been right from any place at any
distance, and so the steps of any plan over this text can be gone through without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zconvert.tidar.acceptance import Sampling, make_drafts, probabilities
from zconvert.tidar.cache import TidarCache
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.layout import decode_layout
from zconvert.tidar.model import LayoutModel

CONTEXT = 512  # tokens before those that are scored; what stands further back changes little
_CHUNK = 64  # tokens of the text in a forward at most, each with a block behind it
_LOGITS = 2**25  # numbers in a forward's logits at most
_LONG = 10**9  # tokens still wanted: the end of a text is not what plans differ by


@dataclass(frozen=True)
class Scored:
    """A stretch of text, c tokens."""

    runs: list[list[int]]
    """[t][o]: how many drafts in a row are right behind slot o of a block whose slot 0 stands at token t, where token
    t + o is the last one known; t = 1 … c - 1 (row 0 is empty), o = 0 … B - 1"""

    def __len__(self) -> int:
        return len(self.runs)


@dataclass(frozen=True)
class Outcome:
    """What a plan makes of scored texts."""

    forwards: int
    yielded: int
    """tokens"""
    processed: int
    """tokens, mask slots included"""


@torch.inference_mode()
def score(
    model: LayoutModel, plan: DecodePlan, sampling: Sampling, block_size: int, tokens: Sequence[int], count: int
) -> Scored:
    """Scores the last tokens of a text.

    Args:
        model: that decoded it.
        plan: how drafts are made.
        sampling: how the text's tokens were chosen. A repetition penalty is left out of account.
        block_size: B.
        tokens: prompt and text.
        count: c, how many of them, from the end, are scored: at least 2.
    """
    first = len(tokens) - count
    context = list(tokens[max(0, first - CONTEXT) : first])
    cache = TidarCache(1)
    device = model.device
    if context:
        model.hidden_states(
            torch.tensor([context], device=device), decode_layout(0, len(context), (), 1, device), cache
        )
        cache.commit(len(context))
    text = torch.tensor(tokens[first:], device=device)
    p = torch.ones(count, device=device)  # of each token, by the target distribution
    q = torch.zeros(count, block_size, device=device)  # of token t + j, by slot j of the block at t
    every = torch.arange(count, device=device)[:, None], torch.arange(block_size, device=device)
    known = (every[0] > 0) & (every[1] > 0) & (every[0] + every[1] < count)  # where token t + j is in the text
    step = max(1, min(_CHUNK, _LOGITS // (block_size * model.config.vocab_size)))
    for begin in range(0, count, step):
        causal = text[begin : begin + step]
        size = len(causal)
        layout = decode_layout(cache.lengths, size, tuple(range(1, size + 1)), block_size, device)
        slots = causal.new_full((layout.num_tokens - size,), plan.mask_token_id)
        hidden = model.hidden_states(torch.cat([causal, slots])[None], layout, cache)[0]
        cache.commit(size)
        if not sampling.greedy:
            clean = probabilities(model.logits(hidden[:size]), sampling)
            last = min(begin + size, count - 1)
            p[begin + 1 : last + 1] = clean[: last - begin].gather(1, text[begin + 1 : last + 1, None])[:, 0]
        # Behind the chunk's token i stands the block at t = i + 1.
        start, slot = known[begin + 1 : begin + 1 + size].nonzero().unbind(1)
        if not len(start):
            continue
        target = begin + 1 + start + slot
        logits = model.logits(hidden[size + start * block_size + slot])[:, None]
        logits[..., plan.mask_token_id : plan.mask_token_id + 1] = -torch.inf
        drafts = make_drafts(
            logits,
            torch.ones_like(target),
            plan.drafting(sampling),
            torch.zeros(len(target), 1, device=device),
            model.bigrams if plan.bigrams else None,
            text[target - 1],
        )
        q[begin + 1 + start, slot] = (
            (drafts.tokens[:, 0] == text[target]).float()
            if drafts.probs is None
            else drafts.probs[:, 0].gather(1, text[target, None])[:, 0]
        )
    # A draft from q passes with probability Σ min(p, q), the mean of min(1, q / p) over tokens drawn from p.
    place = (every[0] + every[1]).clamp_max(count - 1)
    chance = torch.where(known, (q / p[place]).clamp_max(1).pow(sampling.mix_weight), 0.0).cpu()
    right = chance > torch.rand(chance.shape, generator=torch.Generator().manual_seed(count))
    return Scored(_runs(right))


def _runs(right: torch.Tensor) -> list[list[int]]:
    """(c, B) bool, column 0 of no account -> see Scored."""
    run = torch.zeros(right.shape, dtype=torch.long)
    for slot in range(right.shape[1] - 2, -1, -1):
        run[:, slot] = torch.where(right[:, slot + 1], run[:, slot + 1] + 1, 0)
    return run.tolist()


def replay(texts: Sequence[Scored], plan: DecodePlan) -> Outcome:
    """Goes through a plan's steps over texts.

    Args:
        texts: scored with blocks at least as large as the plan's.
        plan: which proposals, and block size.
    """
    forwards = yielded = processed = 0
    size = plan.block_size
    for text in texts:
        end, at, start = len(text) - 1, 1, 1  # a forward reads tokens and yields those after them
        drafts = 0 if plan.two_forwards else size - 1  # a text starts with a block behind its prompt
        while at < end:
            n = 1 + min(drafts, text.runs[start][at - start])
            planned = plan.blocks(drafts, _LONG)
            forwards, processed = forwards + 1, processed + 1 + drafts + size * len(planned)
            usable = [k for k in planned if k <= n]
            yielded += min(n, end - at)
            start, at = at + (usable[-1] if usable else n), at + n
            drafts = size - 1 - (at - start) if usable else 0
    return Outcome(forwards, yielded, processed)
