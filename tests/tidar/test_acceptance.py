"""Probabilities by hand, greedy acceptance, mixing. The law itself: tests/contracts/test_sampling_law.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from zconvert.tidar.acceptance import Drafts, Sampling, accept, draw, make_drafts, probabilities, verify

LOGITS = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.15), math.log(0.05)]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected 0"),
        ({"top_k": -1}, "top_k is -1, expected 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5, expected more than 0 and at most 1"),
        ({"mix_weight": -0.1}, "mix_weight is -0.1, expected 0 to 1"),
        ({"mix_weight": 1.1}, "mix_weight is 1.1, expected 0 to 1"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
)
def test_sampling_refuses_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_sampling_is_greedy_and_lossless_unless_told() -> None:
    assert Sampling().greedy
    assert Sampling().mix_weight == 1
    assert not Sampling(temperature=0.1).greedy


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1.0, top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
        # 0.5 of the squares: temperature comes first
        (Sampling(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(temperature=0.5, top_p=0.9), [0.25 / 0.34, 0.09 / 0.34, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), [0.625, 0.375, 0, 0]),
    ],
    ids=str,
)
def test_probabilities_are_those_worked_out_by_hand(sampling: Sampling, expected: list[float]) -> None:
    torch.testing.assert_close(probabilities(LOGITS, sampling), torch.tensor([expected]).float())


def test_a_whole_number_is_a_temperature_too() -> None:
    torch.testing.assert_close(probabilities(LOGITS, Sampling(temperature=1)), LOGITS.exp())


def test_a_suppressed_token_has_no_probability() -> None:
    logits = LOGITS.clone()
    logits[0, 0] = -torch.inf
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=2.0, top_k=3, top_p=0.99)):
        probs = probabilities(logits, sampling)
        assert probs[0, 0] == 0
        assert float(probs.sum()) == pytest.approx(1)


def test_draws_follow_the_generator_and_the_probabilities() -> None:
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]).repeat(500, 1)
    drawn = draw(probs, generator()).view(500, 2)
    assert drawn[:, 0].unique().tolist() == [1]
    assert drawn[:, 1].unique().tolist() == [0, 2]
    assert 0.4 < float((drawn[:, 1] == 0).float().mean()) < 0.6
    assert torch.equal(drawn.flatten(), draw(probs, generator()))


def point_logits(*tokens: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), 6).float()


@pytest.mark.parametrize(
    ("targets", "count", "following"),
    [
        ((1, 2, 3, 4), 3, 4),  # all right: the row after them
        ((1, 2, 5, 4), 2, 5),
        ((1, 5, 3, 4), 1, 5),  # right again after a wrong one does not count
        ((5, 2, 3, 4), 0, 5),
    ],
)
def test_greedy_acceptance_stops_at_the_first_difference(targets: tuple[int, ...], count: int, following: int) -> None:
    drafts = make_drafts(point_logits(1, 2, 3), Sampling(), None)
    assert drafts.probs is None
    accepted, token = verify(point_logits(*targets), drafts, Sampling(), None)
    assert (accepted, int(token)) == (count, following)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1e-3)], ids=str)
def test_without_drafts_the_next_token_is_drawn(sampling: Sampling) -> None:
    accepted, token = verify(point_logits(4), None, sampling, generator())
    assert (accepted, int(token), token.shape) == (0, 4, torch.Size([]))


def test_drafts_remember_what_they_were_drawn_from_and_their_logits_only_for_mixing() -> None:
    logits = torch.randn(3, 6, generator=generator())
    lossless = make_drafts(logits, Sampling(temperature=0.7), generator())
    mixed = make_drafts(logits, Sampling(temperature=0.7, mix_weight=0.5), generator())
    assert lossless.logits is None
    assert mixed.logits is logits
    assert lossless.probs is not None
    torch.testing.assert_close(lossless.probs, (logits / 0.7).softmax(-1))
    assert torch.equal(lossless.tokens, mixed.tokens)


def test_greedy_mixing_verifies_against_the_weighted_logits() -> None:
    text = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 9.0]])
    diffusion = torch.tensor([[0.0, 3.0, 1.0]])
    drafts = {w: make_drafts(diffusion, Sampling(mix_weight=w), None) for w in (0.7, 0.5)}
    # 0.7: (1.4, 0.9, 1.0), so 0; 0.5: (1.0, 1.5, 1.0), so 1, which was drafted, and then the row after it
    assert [(n, int(t)) for n, t in [verify(text, drafts[0.7], Sampling(mix_weight=0.7), None)]] == [(0, 0)]
    assert [(n, int(t)) for n, t in [verify(text, drafts[0.5], Sampling(mix_weight=0.5), None)]] == [(1, 2)]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mixing_leaves_suppressed_tokens_suppressed(weight: float, temperature: float) -> None:
    text, diffusion = torch.randn(3, 5, generator=generator()), torch.randn(2, 5, generator=generator(1))
    text[:, 2] = diffusion[:, 2] = -torch.inf
    sampling = Sampling(temperature, mix_weight=weight)
    probs = None if temperature == 0 else probabilities(diffusion, sampling)
    for seed in range(20):
        drafts = Drafts(make_drafts(diffusion, sampling, generator(seed)).tokens, probs, diffusion)
        _, token = verify(text, drafts, sampling, generator(seed))
        assert int(token) != 2


def test_mixing_at_full_weight_is_lossless() -> None:
    text, diffusion = torch.randn(4, 6, generator=generator()), torch.randn(3, 6, generator=generator(1))
    for seed in range(50):
        drafts = make_drafts(diffusion, Sampling(temperature=1.0), generator(seed))
        mixed = Drafts(drafts.tokens, drafts.probs, diffusion)
        results = [verify(text, d, Sampling(temperature=1.0), generator(seed)) for d in (drafts, mixed)]
        assert results[0] == results[1]


def test_a_rejected_token_is_never_drawn_again_at_its_place() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.8, 0.1, 0.1]])
    results = [accept(p, q, torch.tensor([0]), generator(seed)) for seed in range(400)]
    accepted = sum(count for count, _ in results)
    assert 60 < accepted < 140, "a quarter"
    assert {int(token) for count, token in results if count == 0} == {1, 2}
    assert {int(token) for count, token in results if count == 1} == {0}
