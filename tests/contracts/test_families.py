"""The contracts on every family of the table, with texts longer than their windows, chunks and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from tests.contracts import checks
from tests.contracts.checks import BLOCK, ROWS, TOLERANCE
from tests.contracts.families import COMPOSITE_MODELS, FAMILY_MODELS, composite_pair, family_pair
from tests.contracts.models import MASK, Pair, random_ids
from tests.contracts.reference import causal_logits
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.engine import Engine, run
from zconvert.tidar.families import COMPOSITES, FAMILIES
from zconvert.tidar.settings import TidarSettings

ROW = "offset 3 in several documents"


@pytest.fixture(scope="module", params=list(FAMILY_MODELS))
def family(request: pytest.FixtureRequest) -> Pair:
    return family_pair(request.param)


def test_every_family_of_the_table_is_tested_here() -> None:
    assert sorted(FAMILY_MODELS) == sorted(FAMILIES)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="an older transformers lacks families")
def test_no_family_is_left_out_where_transformers_is_new_enough() -> None:
    assert [name for name in (*FAMILY_MODELS, *COMPOSITE_MODELS) if name not in transformers.CONFIG_MAPPING] == []


@torch.no_grad()
def test_logits_of_the_converted_model_run_causally_are_the_sources(family: Pair) -> None:
    ids = random_ids((24,), seed=1)
    expected = causal_logits(family.plain, ids)
    assert float(expected.abs().max()) > 0.3, "logits of nothing would prove nothing"
    grafted = family.layout.model(input_ids=ids[None], use_cache=False).logits[0]
    assert torch.equal(grafted, expected), "bit for bit: the plain forward is the stock one"


def test_clean_logits_of_a_packed_row_are_those_of_each_document_alone(family: Pair) -> None:
    for row in (ROW, "one document"):
        assert checks.clean_logits_differ(family, ROWS[row]) < TOLERANCE


def test_clean_tokens_never_see_mask_slots(family: Pair) -> None:
    assert checks.clean_logits_see_mask_slots(family, ROWS[ROW]) < TOLERANCE


def test_mask_slots_see_the_text_before_their_block_and_their_block(family: Pair) -> None:
    for row in (ROW, "short last block"):
        assert checks.mask_logits_differ(family, ROWS[row]) < TOLERANCE


def test_mask_slots_never_see_their_own_clean_block(family: Pair) -> None:
    assert checks.labels_leak(family, ROWS[ROW]) < TOLERANCE


def test_cached_decoding_steps_equal_uncached_ones(family: Pair) -> None:
    assert checks.cached_steps_differ(family) < TOLERANCE


@pytest.mark.parametrize(
    ("proposals", "batch", "fixed"), [((1, 2, 3, 4), 1, False), ((1, 3), 3, False), ((1, 3), 3, True)], ids=str
)
def test_greedy_text_is_the_sources_at_every_accepted_length(
    family: Pair, proposals: tuple[int, ...], batch: int, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = {0: 10} if batch == 1 else {0: 10, 1: 3, 2: 17, 3: 9}  # the fourth takes the place of one that ended
    expected = {key: _greedy(family, _prompt(length), 20 - 4 * key) for key, length in lengths.items()}
    own_drafts = Engine._draft

    def drafts_right_up_to(engine: Engine, rows: list[Any], *places: Any) -> None:
        """In place of the model's own drafts, which random weights get wrong: the text itself, for a while."""
        own_drafts(engine, rows, *places)
        for row in rows:
            if row.drafted is not None:
                told, text = row.result, expected[row.result.request.key]
                right = (told.forwards + told.request.key) % BLOCK
                follow = [*text[len(told.tokens) :], *[0] * BLOCK][: row.num_drafts]
                wrong = [token if i < right else (token + 1) % MASK for i, token in enumerate(follow)]
                row.drafted[0].drafts.tokens[row.drafted[1], : row.num_drafts] = torch.tensor(wrong)

    monkeypatch.setattr(Engine, "_draft", drafts_right_up_to)
    plan = DecodePlan.tidar(TidarSettings(BLOCK, MASK), Sampling(), frozenset(), proposals=proposals)
    # The prompt of 17 is read in two parts.
    engine = Engine(family.layout, plan, max_batch=batch, prefill_chunk=12, fixed_shapes=fixed)
    requests = [Request(_prompt(length), len(expected[key]), key=key) for key, length in lengths.items()]
    results = list(run(engine, requests))
    assert {result.request.key: result.tokens for result in results} == expected
    assert {n for result in results for n in result.accepted} >= ({1, 2, 3, 4} if len(proposals) == 4 else {1, 2, 3})


def _prompt(length: int) -> list[int]:
    return random_ids((length,), seed=length).tolist()


@pytest.mark.parametrize("model_type", list(COMPOSITE_MODELS))
def test_the_text_model_of_a_composite_model_keeps_all_contracts(model_type: str) -> None:
    pair, row = composite_pair(model_type), ROWS[ROW]
    assert checks.clean_logits_differ(pair, row) < TOLERANCE
    assert checks.clean_logits_see_mask_slots(pair, row) < TOLERANCE
    assert checks.mask_logits_differ(pair, row) < TOLERANCE
    assert checks.labels_leak(pair, row) < TOLERANCE
    assert checks.cached_steps_differ(pair) < TOLERANCE


def test_every_composite_model_that_is_taken_is_tested() -> None:
    assert sorted(COMPOSITE_MODELS) == sorted(COMPOSITES)


@torch.no_grad()
def _greedy(pair: Pair, prompt: list[int], count: int) -> list[int]:
    """Greedy text of the untouched model, without any cache."""
    text = list(prompt)
    for _ in range(count):
        logits = causal_logits(pair.plain, torch.tensor(text))[-1]
        logits[MASK] = -torch.inf
        text.append(int(logits.argmax()))
    return text[len(prompt) :]
