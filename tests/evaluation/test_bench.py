"""Measuring the samplers: what the numbers mean, and that they fit each other."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.contracts.models import MASK, random_ids, shared_random_pair
from zconvert.evaluation.bench import bench, entry_of, points
from zconvert.serving.timing import Known, Times
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings

SETTINGS = TidarSettings(block_size=4, mask_token_id=MASK, proposals=(1, 2, 4))
NEW_TOKENS = 12


def measured(**options: Any) -> dict[str, Any]:
    prompts = random_ids((5, 5), seed=3).tolist()
    model = shared_random_pair("qwen3_moe").layout
    own = {"max_new_tokens": [NEW_TOKENS], "mix_weights": [0.5, 0.0], "rivals": ["stock"]}
    of_points = {key: options.pop(key) for key in list(options) if key in POINTS}
    wanted = points(**{**own, **of_points, "baseline": "baseline" in options})
    return bench(model, prompts, SETTINGS, wanted, **options)


POINTS = ("batch_sizes", "max_new_tokens", "prompt_tokens", "modes", "mix_weights", "proposals", "block_size", "rivals")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return measured(batch_sizes=[1, 3], modes=["single", "two"])


def entry(document: dict[str, Any], **fields: Any) -> dict[str, Any]:
    found = entry_of(document, **fields)
    assert found is not None
    return found


def test_every_point_has_an_entry(document: dict[str, Any]) -> None:
    names = ["AR", "stock generate", "lossless", "mixed 0.5", "mixed 0"]
    names += [f"{name}, two forwards" for name in names[2:]]
    assert [e["name"] for e in document["results"]] == 2 * names
    assert [e["batch_size"] for e in document["results"]] == [1] * 8 + [3] * 8
    for each in document["results"]:
        assert each["tokens"] == 5 * NEW_TOKENS
        assert each["tokens_per_second"] == pytest.approx(each["tokens"] / each["seconds"])
    assert entry(document, mode="single")["proposals"] == [1, 2, 4]
    assert document["block_size"] == 4


def test_greedy_lossless_text_is_identical_to_plain_ar_and_to_stock(document: dict[str, Any]) -> None:
    same = [e for e in document["results"] if e["sampler"] == "lossless" or e["mode"] == "stock"]
    assert len(same) == 6
    assert all(each["identical_prompts"] == document["prompts"] == 5 for each in same)


def test_the_accepted_histogram_counts_every_forward_of_every_text(document: dict[str, Any]) -> None:
    for each in document["results"]:
        if each["sampler"] in ("lossless", "mixed"):
            assert list(each["accepted_histogram"]) == ["1", "2", "3", "4"]
            assert sum(each["accepted_histogram"].values()) == each["forwards"]


def test_texts_are_compared_with_a_baseline_by_its_own_decoding() -> None:
    pair = shared_random_pair("qwen3_moe")
    itself = measured(baseline=LayoutModel(pair.plain))
    assert entry(itself, mode="baseline")["tokens_per_forward"] == 1.0
    assert [entry(itself, sampler=name)["identical_to_baseline"] for name in ("ar", "lossless")] == [5, 5]
    other = deepcopy(pair.plain)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    different = measured(baseline=LayoutModel(other))
    assert [entry(different, sampler=name)["identical_to_baseline"] for name in ("ar", "lossless")] == [0, 0]
    assert entry(different, sampler="lossless")["identical_prompts"] == 5


def test_plain_ar_gives_one_token_a_forward(document: dict[str, Any]) -> None:
    for batch in (1, 3):
        ar = entry(document, mode="ar", batch_size=batch)
        assert ar["tokens_per_forward"] == 1.0
        assert (ar["tokens"], ar["forwards"]) == (5 * NEW_TOKENS, 5 * (NEW_TOKENS - 1))
    assert entry(document, mode="ar", batch_size=1)["tokens_in_forward"] == 1.0
    assert 2 < entry(document, mode="ar", batch_size=3)["tokens_in_forward"] <= 3


def test_pure_diffusion_verification_accepts_every_draft(document: dict[str, Any]) -> None:
    # at w = 0 drafts are verified by the logits that they come from
    pure, lossless = (
        entry(document, mode="single", sampler=s, mix_weight=w) for s, w in (("mixed", 0.0), ("lossless", None))
    )
    assert pure["tokens_per_forward"] > lossless["tokens_per_forward"]


def test_ratios_are_those_of_tokens_per_second_in_the_same_place(document: dict[str, Any]) -> None:
    for batch in (1, 3):
        rate = {
            mode: entry(document, mode=mode, batch_size=batch)["tokens_per_second"] for mode in ("ar", "stock", "two")
        }
        two = entry(document, mode="two", batch_size=batch)
        assert two["speedup"] == pytest.approx(rate["two"] / rate["ar"])
        assert two["speedup_over_stock"] == pytest.approx(rate["two"] / rate["stock"])


def test_the_time_of_forwards_is_told_by_their_tokens(document: dict[str, Any]) -> None:
    single = entry(document, mode="single", batch_size=1)
    assert {"16"} <= set(single["forward_ms_by_tokens"]), "4 causal tokens and three blocks of 4"
    assert all(value > 0 for value in single["forward_ms_by_tokens"].values())
    assert single["memory_mb"] > 10


def test_rivals_that_need_no_conversion_are_measured_one_text_at_a_time() -> None:
    assistant = deepcopy(shared_random_pair("qwen3_moe").plain)
    rivals = ["stock", "prompt_lookup", "assisted"]
    document = measured(batch_sizes=[1, 2], rivals=rivals, assistant=assistant, mix_weights=[])
    for mode in ("prompt_lookup", "assisted"):
        own = [e for e in document["results"] if e["mode"] == mode]
        assert [e["batch_size"] for e in own] == [1]
        assert own[0]["identical_prompts"] == 5


def test_a_rival_that_fails_says_why_and_the_rest_is_measured() -> None:
    document = measured(rivals=["stock", "assisted"], assistant=object(), mix_weights=[])
    assert "AttributeError" in entry(document, mode="assisted")["unavailable"]
    assert entry(document, mode="single")["speedup"] > 0


def test_auto_takes_the_plan_of_the_times_it_is_given() -> None:
    known = Known(Times("here", {1: {1: 1.0, 20: 1.0}}))
    document = measured(modes=["auto"], known=known, mix_weights=[])
    assert entry(document, mode="auto")["identical_prompts"] == 5


def test_prompts_are_cut_or_repeated_to_a_length() -> None:
    document = measured(prompt_tokens=[2, 12], mix_weights=[])
    assert [e["prompt_tokens"] for e in document["results"]] == [2, 2, 2, 12, 12, 12]
    assert all(e["identical_prompts"] == 5 for e in document["results"] if e["sampler"] == "lossless")


def test_sampled_texts_are_not_compared_and_a_seed_repeats_them() -> None:
    first, second = (entry(measured(temperature=1.0, seed=4), sampler="lossless") for _ in range(2))
    assert "identical_prompts" not in first
    assert first["accepted_histogram"] == second["accepted_histogram"]


def test_texts_that_end_with_their_first_token_can_be_measured() -> None:
    own = entry(measured(max_new_tokens=[1]), sampler="lossless")
    assert (own["tokens"], own["forwards"], own["tokens_per_forward"]) == (5, 0, 0.0)


def test_progress_is_told_after_each_turn() -> None:
    told: list[tuple[int, int]] = []
    measured(max_new_tokens=[2], on_progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 5), (5, 5)]


def test_no_prompts_and_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        bench(shared_random_pair("qwen3_moe").layout, [], SETTINGS, points())
    with pytest.raises(ValueError, match="mode is 'three', expected one of single, two, auto"):
        points(modes=["three"])
