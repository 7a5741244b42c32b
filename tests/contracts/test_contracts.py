"""The four contracts and the leak test (design: the packed row and decoding steps equal plain transformers)."""

from __future__ import annotations

import pytest

from tests.contracts.checks import (
    ROWS,
    TOLERANCE,
    PackedRow,
    cached_steps_differ,
    clean_logits_differ,
    clean_logits_see_mask_slots,
    labels_leak,
    mask_logits_differ,
)
from tests.contracts.models import Pair

rows = pytest.mark.parametrize("row", list(ROWS.values()), ids=list(ROWS))


@rows
def test_clean_logits_of_a_packed_row_are_those_of_each_document_alone(pair: Pair, row: PackedRow) -> None:
    assert clean_logits_differ(pair, row) < TOLERANCE


@rows
def test_clean_tokens_never_see_mask_slots(pair: Pair, row: PackedRow) -> None:
    assert clean_logits_see_mask_slots(pair, row) < TOLERANCE


@rows
def test_mask_slots_see_the_text_before_their_block_and_their_block(pair: Pair, row: PackedRow) -> None:
    assert mask_logits_differ(pair, row) < TOLERANCE


@rows
def test_mask_slots_never_see_their_own_clean_block(pair: Pair, row: PackedRow) -> None:
    assert labels_leak(pair, row) < TOLERANCE


def test_all_of_it_holds_in_eager_attention(pair: Pair) -> None:
    # Eager attention adds the mask to the scores: a boolean one would be silently wrong there.
    model, row = pair.layout.model, ROWS["several documents"]
    model.set_attn_implementation("eager")
    try:
        checks = (clean_logits_differ, clean_logits_see_mask_slots, mask_logits_differ, labels_leak)
        differences = [check(pair, row) for check in checks]
        assert max(*differences, cached_steps_differ(pair)) < TOLERANCE
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("proposals", [(1, 2, 3, 4), (1, 3), (4,), ()], ids=str)
def test_cached_decoding_steps_equal_uncached_ones(pair: Pair, proposals: tuple[int, ...]) -> None:
    assert cached_steps_differ(pair, proposals=proposals) < TOLERANCE


@pytest.mark.parametrize("prompt", [1, 2])
def test_cached_decoding_works_from_the_shortest_prompts(pair: Pair, prompt: int) -> None:
    assert cached_steps_differ(pair, prompt=prompt) < TOLERANCE
