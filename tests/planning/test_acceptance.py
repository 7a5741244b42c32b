"""Tokens per forward by set of proposals, against a simulation of the decode loop's own planning."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from zconvert.errors import UserError
from zconvert.planning.acceptance import PUBLISHED, best_sets, find_curve, flat_curve, two_forwards, yield_of
from zconvert.tidar.decoding import DecodePlan

DECAYING = (1.0, 0.9, 0.8, 0.75, 0.6, 0.5, 0.4, 0.3)


def simulated(rates: tuple[float, ...], proposals: tuple[int, ...], steps: int = 40_000) -> tuple[float, float]:
    """(tokens a forward yields, tokens it processes) of decoding with drafts that are right at these rates."""
    plan, size, numbers = DecodePlan(0, len(rates), proposals), len(rates), random.Random(1)
    anchor, yielded, processed = 0, 0, 0
    for _ in range(steps):
        causal = size - anchor
        planned = plan.blocks(causal - 1, left=10**9)
        n = 1
        while n < causal and numbers.random() < rates[anchor + n]:
            n += 1
        yielded += n
        processed += causal + size * len(planned)
        usable = [k for k in planned if k <= n]
        anchor = min(n - usable[-1], size - 1) if usable else size - 1
    return yielded / steps, processed / steps


@pytest.mark.parametrize("proposals", [(1,), (1, 4), (3, 6), (2, 5, 8), (8,), tuple(range(1, 9))])
def test_the_chain_yields_what_a_simulated_decoding_does(proposals: tuple[int, ...]) -> None:
    accepted, processed = simulated(DECAYING, proposals)
    found = yield_of(DECAYING, proposals)
    assert found.accepted == pytest.approx(accepted, rel=0.02)
    assert found.tokens == pytest.approx(processed, rel=0.02)


def test_with_every_count_planned_each_draft_is_whole() -> None:
    found = yield_of(DECAYING, tuple(range(1, 9)))
    chains, chain = 1.0, 1.0
    for rate in DECAYING[1:]:
        chain *= rate
        chains += chain
    assert found.accepted == pytest.approx(chains)
    assert found.tokens == pytest.approx(8 + 8 * 8)
    assert two_forwards(DECAYING).accepted == pytest.approx(1 + chains)


def test_more_proposals_never_yield_less() -> None:
    yields = [each.accepted for each in best_sets(DECAYING)]
    assert len(yields) == 8
    assert yields == sorted(yields)
    assert len(best_sets(DECAYING)[2].proposals) == 3


@pytest.mark.parametrize("accepted", [1.0, 4.6, 7.5, 16.0])
def test_a_flat_curve_yields_the_tokens_it_was_made_for(accepted: float) -> None:
    assert two_forwards(flat_curve(accepted, 16).rates).accepted == pytest.approx(1 + accepted)


@pytest.mark.parametrize("accepted", [0.5, 17.0, float("nan")])
def test_tokens_per_forward_outside_the_block_are_refused(accepted: float) -> None:
    with pytest.raises(UserError, match="cannot be"):
        flat_curve(accepted, 16)


def test_published_and_measured_curves_are_found(tmp_path: Path) -> None:
    assert two_forwards(find_curve("tidar-8b", 16).rates).accepted == pytest.approx(9.25)
    assert find_curve("7.5", 16).source == "7.5 tokens per forward"
    rows = [{"slot_accuracy": [0.9, 0.1]}, {"step": 2, "slot_accuracy": [0.99, 0.5, 0.25]}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_curve(str(tmp_path), 16).rates == (1.0, 0.5, 0.25)
    assert set(PUBLISHED) >= {"tidar-1.5b", "tidar-8b", "zyphra-lossless", "zyphra-mixed"}


@pytest.mark.parametrize("text", ["seven", "/no/such/run"])
def test_what_is_no_curve_is_refused_with_the_choices(text: str) -> None:
    with pytest.raises(UserError, match="no acceptance curve") as raised:
        find_curve(text, 16)
    assert "tidar-8b" in str(raised.value)


def test_metrics_without_slot_accuracy_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="has no slot_accuracy"):
        find_curve(str(tmp_path), 16)
