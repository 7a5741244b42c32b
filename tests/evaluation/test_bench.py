"""Measuring the samplers: what the numbers mean, and that they fit each other."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.contracts.models import MASK, random_ids, shared_random_pair
from zconvert.evaluation.bench import bench
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings

SETTINGS = TidarSettings(block_size=4, mask_token_id=MASK, proposals=(1, 2, 4))
NEW_TOKENS = 12


def measured(**options: Any) -> dict[str, Any]:
    prompts = random_ids((3, 5), seed=3).tolist()
    model = shared_random_pair("qwen3_moe").layout
    return bench(model, prompts, SETTINGS, **{"max_new_tokens": NEW_TOKENS, "mix_weights": [0.5, 0.0], **options})


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return measured()


def test_every_sampler_has_an_entry_with_the_same_keys(document: dict[str, Any]) -> None:
    results = document["results"]
    assert list(results) == ["ar", "lossless", "mixed", "mixed:0"]
    assert results["mixed"]["mix_weight"] == 0.5
    assert results["mixed:0"]["mix_weight"] == 0.0
    assert set(results["ar"]) < set(results["lossless"])
    assert set(results["mixed"]) - set(results["lossless"]) == {"mix_weight"}
    assert document["prompts"] == 3
    assert document["proposals"] == [1, 2, 4]
    assert document["block_size"] == 4


def test_greedy_lossless_text_is_identical_to_plain_ar(document: dict[str, Any]) -> None:
    assert document["results"]["lossless"]["identical_prompts"] == document["prompts"]


def test_the_accepted_histogram_counts_every_forward(document: dict[str, Any]) -> None:
    for name, entry in document["results"].items():
        if name != "ar":
            assert list(entry["accepted_histogram"]) == ["1", "2", "3", "4"]
            assert sum(entry["accepted_histogram"].values()) == entry["forwards"]


def test_texts_are_compared_with_a_baseline_by_its_own_decoding() -> None:
    pair = shared_random_pair("qwen3_moe")
    itself = measured(baseline=LayoutModel(pair.plain))["results"]
    assert itself["baseline"]["tokens_per_forward"] == 1.0
    assert [itself[name]["identical_to_baseline"] for name in ("ar", "lossless")] == [3, 3]
    other = deepcopy(pair.plain)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    different = measured(baseline=LayoutModel(other))["results"]
    assert [different[name]["identical_to_baseline"] for name in ("ar", "lossless")] == [0, 0]
    assert different["lossless"]["identical_prompts"] == 3


def test_plain_ar_gives_one_token_a_forward(document: dict[str, Any]) -> None:
    ar = document["results"]["ar"]
    assert ar["tokens_per_forward"] == 1.0
    assert ar["tokens_in_forward"] == 1.0
    assert (ar["tokens"], ar["forwards"]) == (3 * NEW_TOKENS, 3 * (NEW_TOKENS - 1))


def test_pure_diffusion_verification_accepts_every_draft(document: dict[str, Any]) -> None:
    # at w = 0 drafts are verified by the logits that they come from
    assert document["results"]["mixed:0"]["tokens_per_forward"] > document["results"]["lossless"]["tokens_per_forward"]


def test_speedup_is_the_ratio_of_tokens_per_second(document: dict[str, Any]) -> None:
    results = document["results"]
    ratio = results["lossless"]["tokens_per_second"] / results["ar"]["tokens_per_second"]
    assert results["lossless"]["speedup"] == pytest.approx(ratio)
    assert results["ar"]["seconds"] > 0


def test_sampled_texts_are_not_compared_and_a_seed_repeats_them() -> None:
    first, second = (measured(temperature=1.0, seed=4)["results"]["lossless"] for _ in range(2))
    assert first["identical_prompts"] is None
    assert first["accepted_histogram"] == second["accepted_histogram"]


def test_texts_that_end_with_their_first_token_can_be_measured() -> None:
    entry = measured(max_new_tokens=1)["results"]["lossless"]
    assert (entry["tokens"], entry["forwards"], entry["tokens_per_forward"]) == (3, 0, 0.0)


def test_progress_is_told_after_each_prompt() -> None:
    told: list[tuple[int, int]] = []
    measured(max_new_tokens=2, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        bench(shared_random_pair("qwen3_moe").layout, [], SETTINGS)
