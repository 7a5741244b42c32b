"""Which token follows which: counts by hand, drafts by hand, and text that does not change."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.training import trained_pair
from zconvert.tidar.acceptance import Sampling, make_drafts
from zconvert.tidar.bigram import WEIGHT, Bigrams
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.engine import decode
from zconvert.tidar.settings import TidarSettings

TEXT = [torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor([1, 2])]  # 01 twice, 10 twice, 02, 12; nothing across documents


def test_pairs_are_counted_within_documents() -> None:
    bigrams = Bigrams.count(TEXT, 4)
    single = [3 / 10, 3 / 10, 3 / 10, 1 / 10]  # how often a token is the second of a pair, and one more of each

    def expected(pair: int, before: int, token: int) -> float:
        return math.log((pair + single[token]) / (before + 1) / single[token])

    found = bigrams.of(torch.tensor([0, 1, 2]), torch.tensor([[1, 2], [0, 2], [0, 3]]))
    assert found[0].tolist() == pytest.approx([expected(2, 3, 1), expected(1, 3, 2)])
    assert found[1].tolist() == pytest.approx([expected(2, 3, 0), expected(1, 3, 2)])
    assert found[2].tolist() == pytest.approx([0, 0]), "of a token that ends texts nothing is known"
    assert float(bigrams.of(torch.tensor([0]), torch.tensor([[3]]))) == pytest.approx(math.log(1 / 4)), "never seen"


def test_only_the_most_frequent_pairs_are_kept() -> None:
    bigrams = Bigrams.count(TEXT, 4, successors=1)
    assert bigrams.successors.flatten().tolist()[:1] == [1]
    assert bigrams.successors.shape == (4, 1)
    # The pair 02 is no longer known: it counts as one that was never seen.
    assert float(bigrams.of(torch.tensor([0]), torch.tensor([[2]]))) == pytest.approx(math.log(1 / 4))


def test_text_without_pairs_makes_no_difference() -> None:
    bigrams = Bigrams.count([torch.tensor([3])], 4)
    assert bigrams.of(torch.tensor([0, 3]), torch.tensor([[1], [2]])).tolist() == [[0], [0]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1e-3), Sampling(mix_weight=0.5)], ids=str)
def test_a_slot_agrees_with_what_the_slot_before_it_chose(sampling: Sampling) -> None:
    bigrams = Bigrams.count([torch.tensor([0, 1, 2] * 50), torch.tensor([0, 3, 4] * 40)], 6)
    # The first slot is sure of 1 after 0; the second one slightly prefers 4, which follows 3 but never 1.
    logits = torch.zeros(1, 2, 6)
    logits[0, 0, 1], logits[0, 1, 4], logits[0, 1, 2] = 5.0, 1.0, 0.9
    counts, previous, uniform = torch.tensor([2]), torch.tensor([0]), torch.full((1, 2), 0.5)
    alone = make_drafts(logits, counts, sampling, uniform)
    together = make_drafts(logits, counts, sampling, uniform, bigrams, previous)
    assert alone.tokens.tolist() == [[1, 4]]
    assert together.tokens.tolist() == [[1, 2]]
    if together.logits is not None:
        bias = float(bigrams.of(torch.tensor([1]), torch.tensor([[2]])))
        assert float(together.logits[0, 1, 2]) == pytest.approx(0.9 + WEIGHT * bias)


def test_drafts_change_and_lossless_text_does_not() -> None:
    pair, prompt = trained_pair("mixtral"), [0, 2, 4]
    settings = TidarSettings(4, 60)
    plans = [
        DecodePlan.tidar(settings, Sampling(), frozenset()),
        DecodePlan(60, 4, (1, 2, 3, 4), bigrams=False),
    ]
    pair.layout.bigrams = Bigrams.count([torch.tensor([0, 5] * 300)], pair.layout.config.vocab_size)
    try:
        with_bigrams, without = (list(decode(pair.layout, prompt, plan, 40)) for plan in plans)
    finally:
        pair.layout.bigrams = None
    assert [t for s in with_bigrams for t in s.tokens] == [t for s in without for t in s.tokens]
