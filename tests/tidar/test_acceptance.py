"""Probabilities by hand, greedy acceptance, mixing. The law itself: tests/contracts/test_sampling_law.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from zconvert.tidar.acceptance import (
    Drafts,
    Sampling,
    accept,
    draw,
    make_drafts,
    penalised,
    probabilities,
    verify,
)

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
        ({"min_p": 1.5}, "min_p is 1.5, expected 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected more than 0"),
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
        # The first two are 0.84 of the first three, and 0.8 of all: top-k comes before top-p, and that before min-p.
        (Sampling(temperature=1.0, top_k=3, top_p=0.83), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.83, min_p=0.2), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (Sampling(temperature=0.5, min_p=0.25), [0.25 / 0.34, 0.09 / 0.34, 0, 0]),
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


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]).repeat(500, 1).view(500, 2, 3)
    drawn = draw(probs, torch.rand(500, 2, generator=generator()))
    assert drawn[:, 0].unique().tolist() == [1]
    assert drawn[:, 1].unique().tolist() == [0, 2]
    assert 0.4 < float((drawn[:, 1] == 0).float().mean()) < 0.6


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
    drafts = made(point_logits(1, 2, 3), Sampling())
    assert drafts.probs is None
    assert verified(point_logits(*targets), drafts, Sampling()) == (count, following)


def test_rows_are_verified_each_by_its_own_drafts_and_their_number() -> None:
    drafts = make_drafts(point_logits(1, 2, 3).expand(4, -1, -1), torch.tensor([3, 3, 1, 0]), Sampling(), None)
    targets = torch.stack([point_logits(1, 2, 3, 4), point_logits(1, 5, 3, 4), *[point_logits(1, 2, 3, 4)] * 2])
    accepted, following = verify(targets, drafts, Sampling(), None)
    assert accepted.tolist() == [3, 1, 1, 0]
    assert following.tolist() == [4, 5, 2, 1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1e-3)], ids=str)
def test_without_drafts_the_next_token_is_drawn(sampling: Sampling) -> None:
    assert verified(point_logits(4), None, sampling) == (0, 4)


def test_drafts_remember_what_they_were_drawn_from_and_their_logits_only_for_mixing() -> None:
    logits = torch.randn(3, 6, generator=generator())
    lossless = made(logits, Sampling(temperature=0.7))
    mixed = made(logits, Sampling(temperature=0.7, mix_weight=0.5))
    assert lossless.logits is None
    assert mixed.logits is not None
    assert torch.equal(mixed.logits[0], logits)
    assert lossless.probs is not None
    torch.testing.assert_close(lossless.probs[0], (logits / 0.7).softmax(-1))
    assert torch.equal(lossless.tokens, mixed.tokens)


def test_greedy_mixing_verifies_against_the_weighted_logits() -> None:
    text = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 9.0]])
    diffusion = torch.tensor([[0.0, 3.0, 1.0]])
    # 0.7: (1.4, 0.9, 1.0), so 0; 0.5: (1.0, 1.5, 1.0), so 1, which was drafted, and then the row after it
    for weight, expected in ((0.7, (0, 0)), (0.5, (1, 2))):
        sampling = Sampling(mix_weight=weight)
        assert verified(text, made(diffusion, sampling), sampling) == expected


def test_a_row_without_drafts_is_not_mixed() -> None:
    text, diffusion = point_logits(1, 2)[None], point_logits(3)[None]
    drafts = make_drafts(diffusion, torch.tensor([0]), Sampling(mix_weight=0.0), None)
    assert verify(text, drafts, Sampling(mix_weight=0.0), None)[1].tolist() == [1]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mixing_leaves_suppressed_tokens_suppressed(weight: float, temperature: float) -> None:
    text, diffusion = torch.randn(3, 5, generator=generator()), torch.randn(2, 5, generator=generator(1))
    text[:, 2] = diffusion[:, 2] = -torch.inf
    sampling = Sampling(temperature, mix_weight=weight)
    for seed in range(20):
        drafts = made(diffusion, sampling, seed)
        drafts = Drafts(drafts.tokens, drafts.counts, drafts.probs, diffusion[None])
        assert verified(text, drafts, sampling, seed)[1] != 2


def test_mixing_at_full_weight_is_lossless() -> None:
    text, diffusion = torch.randn(4, 6, generator=generator()), torch.randn(3, 6, generator=generator(1))
    for seed in range(50):
        drafts = made(diffusion, Sampling(temperature=1.0), seed)
        mixed = Drafts(drafts.tokens, drafts.counts, drafts.probs, diffusion[None])
        results = [verified(text, d, Sampling(temperature=1.0), seed) for d in (drafts, mixed)]
        assert results[0] == results[1]


def test_a_rejected_token_is_never_drawn_again_at_its_place() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]).expand(400, -1, -1)
    q = torch.tensor([[0.8, 0.1, 0.1]]).expand(400, -1, -1)
    uniform = torch.rand(400, 2, generator=generator())
    accepted, following = accept(p, q, torch.zeros(400, 1).long(), torch.ones(400).long(), uniform)
    assert 60 < int(accepted.sum()) < 140, "a quarter"
    assert following[accepted == 0].unique().tolist() == [1, 2]
    assert following[accepted == 1].unique().tolist() == [0]


def test_after_drafts_that_are_all_accepted_comes_a_token_of_p_whatever_fills_the_row_up() -> None:
    p, q = torch.full((1, 3, 2), 0.5), torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])  # the second place is filling
    accepted, following = accept(p, q, torch.zeros(1, 2).long(), torch.tensor([1]), torch.tensor([[0.0, 0.0, 0.9]]))
    assert (int(accepted), int(following)) == (1, 1)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_is_that_of_transformers_at_every_position(penalty: float) -> None:
    texts = torch.tensor([[1, 4, 4, 7], [0, 2, 5, 2]])
    drafts = torch.tensor([[3, 3, 1], [6, 0, 6]])  # new, repeated, in the text already
    logits = torch.randn(2, 4, 8, generator=generator())
    seen = torch.zeros(2, 8, dtype=torch.bool).scatter(1, texts, True)
    got = penalised(logits, seen, penalty, drafts)
    stock = RepetitionPenaltyLogitsProcessor(penalty)
    for place in range(4):
        before = torch.cat([texts, drafts[:, :place]], dim=1)
        assert torch.equal(got[:, place], stock(before, logits[:, place]))
    # Without drafts: the text before the first position is all that is known.
    for place in range(4):
        assert torch.equal(penalised(logits, seen, penalty)[:, place], stock(texts, logits[:, place]))


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_an_accepted_draft_is_penalised_at_the_places_after_it(temperature: float) -> None:
    # 1 leads by a little, until it stands in the text: then 2 does, until that stands there too.
    logits = torch.tensor([[1.0, 2.0, 1.9]]).expand(4, -1)
    for tokens, expected in (([1, 2, 1], (3, 1)), ([1, 1, 1], (1, 2)), ([2, 1, 1], (0, 1))):
        drafts = Drafts(
            torch.tensor([tokens]), torch.tensor([3]), torch.nn.functional.one_hot(torch.tensor([tokens]), 3).float()
        )
        sampling = Sampling(temperature, repetition_penalty=1.5)
        accepted, following = verify(logits[None], drafts, sampling, torch.full((1, 4), 0.5), torch.zeros(1, 3).bool())
        assert (int(accepted), int(following)) == expected


def test_the_penalty_reaches_the_target_and_min_p_cuts_by_the_likeliest_token() -> None:
    seen = torch.zeros(1, 6, dtype=torch.bool)
    seen[0, 4] = True
    sampling = Sampling(repetition_penalty=3.0)
    accepted, following = verify(torch.tensor([[[0.0, 1.0, 0, 0, 2.0, 0]]]), None, sampling, None, seen)
    assert (int(accepted), int(following)) == (0, 1)
    probs = probabilities(LOGITS, Sampling(temperature=1.0, min_p=0.4))
    torch.testing.assert_close(probs, torch.tensor([[0.625, 0.375, 0, 0]]))


def made(logits: torch.Tensor, sampling: Sampling, seed: int = 0) -> Drafts:
    """Drafts of one row, all of which count."""
    uniform = torch.rand(1, len(logits), generator=generator(seed))
    return make_drafts(logits[None], torch.tensor([len(logits)]), sampling, uniform)


def verified(logits: torch.Tensor, drafts: Drafts | None, sampling: Sampling, seed: int = 0) -> tuple[int, int]:
    """`verify` of one row."""
    uniform = torch.rand(1, len(logits), generator=generator(seed))
    accepted, following = verify(logits[None], drafts, sampling, uniform)
    assert accepted.shape == following.shape == (1,)
    return int(accepted), int(following)
