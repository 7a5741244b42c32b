"""pass@k is what counting every draw gives, intervals cover what they say, and a verdict says no more than it can."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from zconvert.evaluation import statistics
from zconvert.evaluation.statistics import difference, interval_of_mean, pass_at_k

# 1 - C(n - c, k) / C(n, k) in exact fractions; n = 200 and k = 1, 10, 100 as in the paper, arXiv 2107.03374.
EXACT = [
    (200, 1, 1, 0.005),
    (200, 1, 10, 0.05),
    (200, 1, 100, 0.5),
    (200, 10, 10, 0.408548),
    (200, 50, 10, 0.947906),
    (100, 20, 5, 0.680691),
    (16, 8, 4, 0.961538),
    (16, 1, 16, 1.0),
]


@pytest.mark.parametrize(("n", "c", "k", "value"), EXACT)
def test_it_agrees_with_exact_fractions(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("n", range(1, 8))
def test_it_is_the_share_of_all_draws_of_k_that_hold_a_right_one(n: int) -> None:
    for c in range(n + 1):
        right = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            draws = [any(draw) for draw in combinations(right, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_it_has_no_bias() -> None:
    rng, p, k = np.random.default_rng(0), 0.3, 4
    mean = np.mean([pass_at_k(10, c, k) for c in rng.binomial(10, p, 100_000)])
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=2e-3)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_a_k_above_n_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        pass_at_k(n, c, k)


def draw_pair(rng: np.random.Generator, problems: int, n: int, shift: float) -> tuple[list[float], list[float]]:
    """pass@1 of two columns on the same problems of mixed difficulty."""
    hard = rng.beta(2, 1, problems)
    own = rng.binomial(n, np.clip(hard * (1 + shift), 0, 1)) / n
    return list(own), list(rng.binomial(n, hard) / n)


@pytest.mark.parametrize(("problems", "n"), [(10, 4), (100, 1), (60, 16)])
def test_intervals_cover_the_truth_as_often_as_they_say(problems: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, repeats, true_mean = np.random.default_rng(problems), 500, 2 / 3
    covered = alike = 0
    for repeat in range(repeats):
        own, other = draw_pair(rng, problems, n, 0.0)
        low, high = interval_of_mean(own, low=0, high=1, seed=repeat)
        covered += low <= true_mean <= high
        low, high = difference(own, other, margin=0.02, seed=repeat).interval
        alike += low <= 0 <= high
    # 95 % wanted; 500 repeats tell it to 2 points, and percentiles of skewed values are a little short.
    assert covered / repeats == pytest.approx(0.95, abs=0.03)
    assert alike / repeats == pytest.approx(0.95, abs=0.03)


def test_where_nothing_varies_the_interval_is_by_the_rule_of_three() -> None:
    assert interval_of_mean([1.0] * 60, low=0, high=1) == (0.95, 1.0)
    assert interval_of_mean([0.0] * 2, low=0, high=1) == (0.0, 1.0)
    assert interval_of_mean([], low=0, high=1) == (0, 1)


def test_pairing_finds_what_two_intervals_apart_would_not() -> None:
    hard = np.random.default_rng(0).beta(1, 1, 200)
    own, other = list(np.round(hard * 100) / 100 - 0.02), list(np.round(hard * 100) / 100)
    apart = [interval_of_mean(each, low=0, high=1) for each in (own, other)]
    assert apart[0][1] > apart[1][0]
    found = difference(own, [value - 0.01 * (i % 3) for i, value in enumerate(other)], margin=0.02)
    assert (found.verdict, found.problems_needed) == ("worse", None)
    assert difference(other, own, margin=0.02).verdict == "better"


def test_the_same_answers_are_no_difference_where_the_problems_are_many() -> None:
    assert difference([1.0] * 200, [1.0] * 200, margin=0.02).verdict == "no difference found"
    few = difference([1.0, 0.5], [1.0, 0.5], margin=0.02)
    assert (few.verdict, few.problems_needed) == ("too few samples to tell", 150)
    assert difference([], [], margin=0.02).verdict == "too few samples to tell"


def test_the_problems_that_are_needed_go_by_the_difference_that_there_seems_to_be() -> None:
    values = list(np.random.default_rng(1).normal(0.0, 0.1, 60))
    centred = [value - sum(values) / 60 for value in values]
    near_0, between, clear = (
        difference([value + mean for value in centred], [0.0] * 60, margin=0.02) for mean in (0, 0.01, 0.02)
    )
    assert near_0.problems_needed == pytest.approx(clear.problems_needed, rel=0.05)
    assert between.problems_needed == pytest.approx(4 * clear.problems_needed, rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_as_many_problems_as_are_asked_for_do_tell_if_they_go_like_those_before(seed: int) -> None:
    own, other = draw_pair(np.random.default_rng(seed), 60, 4, 0.0)
    few = difference(own, other, margin=0.02)
    assert few.verdict == "too few samples to tell"
    assert few.problems_needed is not None
    times = -(-few.problems_needed // 60) + 1
    assert difference(own * times, other * times, margin=0.02).verdict != few.verdict
