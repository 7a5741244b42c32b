"""Sampled text has exactly the law of plain sampling: tested by chi-square, with samplers that must fail the test.

Tiny models over five tokens and the mask. The law of the first three tokens of a text, 125 of them, is enumerated with
plain transformers; the engine then decodes the same prompt thousands of times. Two drafts a step, both of which get
accepted and rejected, so that all three tokens come from every path there is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.models import Pair, random_pair
from tests.contracts.reference import causal_logits
from zconvert.tidar import acceptance
from zconvert.tidar.acceptance import Drafts, Sampling
from zconvert.tidar.bigram import Bigrams
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.engine import Engine, run
from zconvert.tidar.settings import TidarSettings

TOKENS = 5
MASK = TOKENS
BLOCK = 3
PROMPT = [1, 2, 0]
BATCH = 8
DRAWS, FEWER_DRAWS = 1500, 1000  # what is broken shows sooner
FITS, BROKEN = 1e-3, 1e-6  # p-values; seeds are fixed, so a test either always passes or never

TINY = {"vocab_size": TOKENS + 1, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@cache
def tiny_pair(name: str) -> Pair:
    extra: dict[str, Any] = {"layer_types": ["hybrid_sliding"]} if name == "zaya_sliding" else {}
    return random_pair(name, **TINY, **extra, initializer_range=0.3)


def target(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k and top-p by their definitions: (V,) logits -> (V,) probabilities."""
    logits = logits.double().clone()
    logits[MASK] = -torch.inf
    probs = (logits / sampling.temperature).softmax(-1)
    if sampling.top_k:
        probs[probs < probs.sort(descending=True).values[sampling.top_k - 1]] = 0
        probs = probs / probs.sum()
    if sampling.top_p < 1:
        # The fewest likeliest tokens that together reach top_p.
        order = probs.argsort(descending=True)
        before = probs[order].cumsum(0) - probs[order]
        probs[order[before >= sampling.top_p]] = 0
        probs = probs / probs.sum()
    return probs


@cache
@torch.no_grad()
def exact_law(pair: Pair, sampling: Sampling, length: int = 3) -> Tensor:
    """(5, …, 5): the probability under plain sampling of every text of `length` tokens."""

    def continuations(text: tuple[int, ...]) -> Tensor:
        logits = causal_logits(pair.plain, torch.tensor([*PROMPT, *text]))[-1]
        probs = target(logits, sampling)[:TOKENS]
        if len(text) == length - 1:
            return probs
        return torch.stack([probs[token] * continuations((*text, token)) for token in range(TOKENS)])

    return continuations(())


def drawn(
    pair: Pair,
    sampling: Sampling,
    proposals: tuple[int, ...],
    draws: int,
    length: int = 3,
    seed: int = 0,
    batch: int = BATCH,
    two_forwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """(5, …, 5) counts of the texts that the engine draws, and (BLOCK + 1,) counts of what its steps accepted."""
    own = None if two_forwards else proposals
    settings = TidarSettings(BLOCK, MASK)
    plan = DecodePlan.tidar(settings, sampling, frozenset(), proposals=own, two_forwards=two_forwards)
    # Longer than what is looked at: a step drafts no further than the text may go.
    requests = [Request(PROMPT, length + BLOCK, seed=draws * seed + draw) for draw in range(draws)]
    texts, accepted = torch.zeros([TOKENS] * length), torch.zeros(BLOCK + 1)
    for result in run(Engine(pair.layout, plan, max_batch=batch), requests):
        texts[tuple(result.tokens[:length])] += 1
        for count in result.accepted:
            accepted[count] += 1
    return texts, accepted


def p_value(counts: Tensor, law: Tensor) -> float:
    """Chi-square of counts against a law; texts that are expected fewer than five times are taken together."""
    counts, expected = counts.flatten().double(), law.flatten() * counts.sum()
    if counts[expected == 0].any():
        return 0.0  # what cannot be was seen
    counts, expected = counts[expected > 0], expected[expected > 0]
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
        expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, statistic / 2))


ALL = (1, 2, 3)
# Model, sampling, proposals, and how many tokens to draw. With proposals 1 and 3, accepting two drafts shortens the
# next ones: that is seen in the fourth token first, so the law of the last three of four is tested there.
CONFIGURATIONS: dict[str, tuple[str, Sampling, tuple[int, ...], int]] = {
    "temperature 1": ("mixtral", Sampling(temperature=1.0), ALL, 3),
    "temperature 1, zaya": ("zaya_sliding", Sampling(temperature=1.0), ALL, 3),
    "temperature 0.7, top-p 0.9": ("mixtral", Sampling(temperature=0.7, top_p=0.9), ALL, 3),
    "top-k 3": ("qwen3_moe", Sampling(temperature=1.0, top_k=3), ALL, 3),
    "mix weight 1": ("mixtral", Sampling(temperature=1.0, mix_weight=1.0), (2, 3), 3),
    "proposals 1 and 3": ("mixtral", Sampling(temperature=1.0), (1, 3), 4),
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_first_three_tokens_have_the_law_of_plain_sampling(configuration: str) -> None:
    name, sampling, proposals, length = CONFIGURATIONS[configuration]
    fits(tiny_pair(name), sampling, proposals, length, batch=1 if configuration == "top-k 3" else BATCH)


def test_with_two_forwards_in_turn_they_have_it_too() -> None:
    fits(tiny_pair("zaya_sliding"), Sampling(temperature=1.0), (1,), 4, two_forwards=True)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.8, top_k=3)], ids=str)
def test_with_drafts_from_left_to_right_they_have_it_too(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, texts = tiny_pair("mixtral"), torch.randint(0, TOKENS, (40, 20), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(pair.layout, "bigrams", Bigrams.count(texts.sort(1).values, TOKENS + 1))
    monkeypatch.setattr(acceptance, "WEIGHT", 3.0)  # strong enough that drafts differ from those without
    fits(pair, sampling, ALL, 3)


def fits(pair: Pair, sampling: Sampling, proposals: tuple[int, ...], length: int, **options: Any) -> None:
    counts, accepted = drawn(pair, sampling, proposals, DRAWS, length, **options)
    after_prefill = accepted[1:] / accepted[1:].sum()
    assert after_prefill.min() > 0.03, "every number of drafts must be accepted now and then"
    law = exact_law(pair, sampling, length)
    while law.dim() > 3:
        counts, law = counts.sum(0), law.sum(0)
    assert p_value(counts, law) > FITS


def accept_with(
    ratio: Callable[[Tensor, Tensor], Tensor], residual: Callable[[Tensor, Tensor], Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`acceptance.accept` with another acceptance probability or another residual."""

    def accept(p: Tensor, q: Tensor, tokens: Tensor, counts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        numbers, following = [], []
        for row, count in enumerate(counts.tolist()):
            chosen = tokens[row, :count, None]
            probability = ratio(p[row, :count].gather(-1, chosen), q[row, :count].gather(-1, chosen)).squeeze(-1)
            number = int((uniform[row, :count] < probability).cumprod(0).sum())
            numbers.append(number)
            after = residual(p[row, number], q[row, number]) if number < count else p[row, number]
            following.append(acceptance.draw(after, uniform[row, -1]))
        return torch.tensor(numbers), torch.stack(following)

    return accept


def right_ratio(p: Tensor, q: Tensor) -> Tensor:
    return p / q


def right_residual(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp_min(0)


BROKEN_SAMPLERS = {
    "the residual is p": accept_with(right_ratio, lambda p, q: p),
    "the residual is |p - q|": accept_with(right_ratio, lambda p, q: (p - q).abs()),
    "acceptance is min(1, q / p)": accept_with(lambda p, q: q / p, right_residual),
    "acceptance is p": accept_with(lambda p, q: p, right_residual),
    "every draft is accepted": accept_with(lambda p, q: torch.ones_like(p), right_residual),
}


@pytest.mark.parametrize("broken", BROKEN_SAMPLERS)
def test_a_broken_sampler_fails_the_same_test(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sampling, proposals, _ = CONFIGURATIONS["temperature 1"]
    monkeypatch.setattr(acceptance, "accept", BROKEN_SAMPLERS[broken])
    counts, _ = drawn(tiny_pair(name), sampling, proposals, FEWER_DRAWS)
    assert p_value(counts, exact_law(tiny_pair(name), sampling)) < BROKEN


def test_the_right_sampler_written_the_same_way_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    name, sampling, proposals, _ = CONFIGURATIONS["temperature 1"]
    monkeypatch.setattr(acceptance, "accept", accept_with(right_ratio, right_residual))
    counts, _ = drawn(tiny_pair(name), sampling, proposals, FEWER_DRAWS, seed=1)
    assert p_value(counts, exact_law(tiny_pair(name), sampling)) > FITS


def test_drafts_that_misreport_what_they_were_drawn_from_fail_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, proposals, _ = CONFIGURATIONS["temperature 1"]
    sampling = Sampling(temperature=0.5)
    honest = acceptance.make_drafts

    def dishonest(logits: Tensor, counts: Tensor, how: Sampling, uniform: Tensor, *_: object) -> Drafts:
        drafts = honest(logits, counts, how, uniform)
        return Drafts(drafts.tokens, counts, logits.softmax(-1), drafts.logits)  # forgets the temperature

    monkeypatch.setattr("zconvert.tidar.engine.make_drafts", dishonest)
    counts, _ = drawn(tiny_pair(name), sampling, proposals, FEWER_DRAWS)
    assert p_value(counts, exact_law(tiny_pair(name), sampling)) < BROKEN


def test_mixing_has_another_law() -> None:
    # Else "mix weight 1" above would prove nothing: at w = 0.3 the text is no longer that of plain sampling.
    name, sampling, proposals, _ = CONFIGURATIONS["temperature 1"]
    counts, _ = drawn(tiny_pair(name), Sampling(temperature=1.0, mix_weight=0.3), proposals, FEWER_DRAWS)
    assert p_value(counts, exact_law(tiny_pair(name), sampling)) < BROKEN


def test_the_exact_law_adds_up_and_the_test_accepts_its_own_draws() -> None:
    law = exact_law(tiny_pair("mixtral"), Sampling(temperature=1.0))
    assert float(law.sum()) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    texts = torch.multinomial(law.flatten(), 20_000, replacement=True, generator=generator)
    assert p_value(torch.bincount(texts, minlength=law.numel()).float(), law) > FITS


# The rule itself, exactly: no sampling noise at all.


def accepted_and_following(p: Tensor, q: Tensor, tokens: Tensor, uniform: Tensor) -> tuple[int, int]:
    """`acceptance.accept` on one row whose drafts all count."""
    accepted, following = acceptance.accept(p[None], q[None], tokens[None], torch.tensor([len(q)]), uniform[None])
    return int(accepted), int(following)


def acceptance_probability(p: Tensor, q: Tensor, place: int, token: int) -> float:
    """By bisection on the uniform number at one place, 0 (accept) standing at all others."""
    tokens = torch.zeros(len(q), dtype=torch.long)
    tokens[place] = token
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        uniform = torch.zeros(len(q) + 1, dtype=torch.double)
        uniform[place] = middle
        accepted, _ = accepted_and_following(p, q, tokens, uniform)
        low, high = (middle, high) if accepted > place else (low, middle)
    return low


def law_at(p: Tensor, q: Tensor, place: int, patch: pytest.MonkeyPatch) -> Tensor:
    """The law of the token at a place, the drafts before it being accepted: a sum over what is drafted there."""
    residuals: list[Tensor] = []

    def record(probs: Tensor, _: object) -> Tensor:
        residuals.append(probs[0] / probs[0].sum())
        return probs.argmax(-1)

    patch.setattr(acceptance, "draw", record)
    law = torch.zeros(q.shape[1], dtype=torch.double)
    for token in range(q.shape[1]):
        accepted = acceptance_probability(p, q, place, token)
        uniform = torch.zeros(len(q) + 1, dtype=torch.double)
        uniform[place] = 1.0  # a rejection, whatever the draft
        tokens = torch.zeros(len(q), dtype=torch.long)
        tokens[place] = token
        accepted_and_following(p, q, tokens, uniform)
        law[token] += q[place, token] * accepted
        if accepted < 1 - 1e-9:  # else a rejection cannot happen
            law += q[place, token] * (1 - accepted) * residuals[-1]
    return law


@pytest.mark.parametrize(("place", "seed"), list(product((0, 1, 2), (0, 1))))
def test_summed_over_all_drafts_a_token_has_exactly_the_law_p(
    place: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(rows, 6, generator=generator, dtype=torch.double).mul(1.5).softmax(-1) for rows in (4, 3))
    assert float((p[place] - q[place]).abs().sum()) > 0.2
    torch.testing.assert_close(law_at(p, q, place, monkeypatch), p[place], rtol=0, atol=1e-6)


def test_a_draft_that_p_never_gives_is_never_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([[0.0, 0.4, 0.6], [0.2, 0.3, 0.5]], dtype=torch.double)
    q = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.double)
    torch.testing.assert_close(law_at(p, q, 0, monkeypatch), p[0], rtol=0, atol=1e-6)


def test_where_p_and_q_are_equal_every_draft_is_accepted_and_nothing_breaks() -> None:
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    for token in (0, 1):
        assert acceptance_probability(p, p[:1], 0, token) == pytest.approx(1)
    # 1 is never drawn; it stands for a rejection that rounding makes
    assert accepted_and_following(p, p[:1], torch.tensor([1]), torch.tensor([1.0, 0.5]))[0] == 0


@pytest.mark.parametrize("size", [3, 50, 4000])
def test_a_token_is_drawn_by_exactly_its_share_of_the_uniform_numbers(size: int) -> None:
    probs = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(3).softmax(-1)
    probs[size // 2] = 0
    probs /= probs.sum()
    edges = torch.cat([torch.zeros(1, dtype=torch.double), probs.double().cumsum(0)])
    edges /= edges[-1].clone()
    inside = probs > 1e-8
    for share in (1e-4, 0.5, 1 - 1e-4):  # just inside, in the middle, just before the end of each token's share
        numbers = (edges[:-1] + share * (edges[1:] - edges[:-1]))[inside]
        drawn = acceptance.draw(probs.expand(len(numbers), -1), numbers)
        assert torch.equal(drawn, torch.arange(size)[inside])
    ends = acceptance.draw(probs.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.double))
    assert (probs[ends] > 0).all()
