"""The engine: texts in a batch are what they are alone, rows come and go, and nothing is lost on the way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.contracts.checks import BLOCK
from tests.contracts.models import MASK, Pair, random_ids, random_pair, shared_random_pair
from tests.contracts.training import circular_texts, trained_pair
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request, Result
from zconvert.tidar.engine import Engine, decode, run
from zconvert.tidar.settings import TidarSettings

SETTINGS = TidarSettings(BLOCK, MASK)
PLANS = {
    "all proposals": DecodePlan.tidar(SETTINGS, Sampling(), frozenset(), proposals=(1, 2, 3, 4)),
    "some proposals": DecodePlan.tidar(SETTINGS, Sampling(), frozenset(), proposals=(2, 3)),
    "two forwards": DecodePlan.tidar(SETTINGS, Sampling(), frozenset(), two_forwards=True),
    "ar": DecodePlan.autoregressive(MASK, Sampling(), frozenset()),
}
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=7),
    Sampling(temperature=1.2, top_p=0.9, mix_weight=0.5),
    Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.2),
    Sampling(mix_weight=0.4),
    Sampling(repetition_penalty=1.3),
)
MODELS = ("mixtral", "zaya_sliding")


def texts_of(results: Sequence[Result]) -> dict[Any, list[int]]:
    return {result.request.key: result.tokens for result in results}


def some_requests(count: int, seed: int) -> list[Request]:
    """Prompts of a walk or of noise, every way of choosing tokens, lengths from 1, some with end tokens."""
    choose = random.Random(seed)
    requests = []
    for key in range(count):
        length = choose.randint(1, 30)
        walk = circular_texts(1, length, torch.Generator().manual_seed(key))[0].tolist()
        prompt = walk if choose.random() < 0.7 else random_ids((length,), seed=key).tolist()
        eos = frozenset(choose.sample(range(12), choose.choice((0, 0, 1, 2))))
        sampling = choose.choice(SAMPLINGS)
        requests.append(Request(prompt, choose.randint(1, 24), sampling, seed=key, eos_token_ids=eos, key=key))
    return requests


@cache
def alone(model: str, plan: str, seed: int, count: int = 10) -> dict[Any, list[int]]:
    results = []
    for request in some_requests(count, seed):
        results += list(run(Engine(trained_pair(model).layout, PLANS[plan], max_batch=1), [request]))
    return texts_of(results)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_a_text_is_the_same_alone_and_in_any_batch(model: str, plan: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1))
    expected = alone(model, plan, seed)
    requests = data.draw(st.permutations(some_requests(10, seed)))
    batch, chunk = data.draw(st.integers(1, 8)), data.draw(st.sampled_from((3, 11, 2048)))
    fixed = data.draw(st.booleans())
    engine = Engine(trained_pair(model).layout, PLANS[plan], max_batch=batch, prefill_chunk=chunk, fixed_shapes=fixed)
    # Some come while others are under way, some are cancelled: their neighbours must not notice.
    cancelled = set(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    late = data.draw(st.integers(0, 9))
    handles = [engine.add(request) for request in requests[late:]]
    steps = 0
    while not engine.idle:
        if steps == 2:
            handles += [engine.add(request) for request in requests[:late]]
        engine.step()
        steps += 1
        if steps == 4:
            for handle in handles:
                if handle.request.key in cancelled:
                    engine.cancel(handle)
        if engine.idle and steps < 3:
            handles += [engine.add(request) for request in requests[:late]]
            steps = 3
    for handle in handles:
        text = expected[handle.request.key]
        if handle.finish == "cancelled":
            assert handle.request.key in cancelled
            assert handle.tokens == text[: len(handle.tokens)]
        else:
            assert handle.tokens == text
    assert len(handles) == len(requests)


@pytest.mark.parametrize("plan", PLANS)
def test_every_way_to_end_is_told(plan: str) -> None:
    pair = trained_pair("mixtral")
    walk = list(range(8))
    whole = next(iter(run(Engine(pair.layout, PLANS[plan]), [Request(walk, 9)]))).tokens
    requests = [
        Request(walk, 9, key="length"),
        Request(walk, 9, eos_token_ids=frozenset({whole[4]}), key="eos"),
        Request(walk, 9, stop=lambda tokens: 3 if len(tokens) >= 3 else None, key="stop"),
        Request(walk, 1, key="one"),
        Request(walk, 5, eos_token_ids=frozenset({whole[4]}), key="eos at the length"),
    ]
    results = {result.request.key: result for result in run(Engine(pair.layout, PLANS[plan]), requests)}
    assert {key: result.finish for key, result in results.items()} == {
        "length": "length",
        "eos": "eos",
        "stop": "stop",
        "one": "length",
        "eos at the length": "eos",
    }
    assert texts_of(list(results.values())) == {
        "length": whole,
        "eos": whole[: whole.index(whole[4]) + 1],
        "stop": whole[:3],
        "one": whole[:1],
        "eos at the length": whole[:5],
    }


def test_accepted_drafts_are_counted_for_each_text_and_for_all() -> None:
    engine = Engine(trained_pair("mixtral").layout, PLANS["all proposals"], max_batch=3)
    results = list(run(engine, [Request(list(range(8)), 12, key=i) for i in range(5)]))
    counted = [n for result in results for n in result.accepted]
    assert engine.counters.accepted == {n: counted.count(n) for n in set(counted)}
    assert max(counted) > 1
    assert engine.counters.tokens == sum(len(result.tokens) for result in results) == 60
    assert engine.counters.requests == 5


def test_results_come_as_texts_end_and_requests_are_taken_as_rows_become_free() -> None:
    engine = Engine(shared_random_pair("mixtral").layout, PLANS["ar"], max_batch=2)
    taken = []

    def requests() -> Any:
        for key, length in enumerate((9, 2, 2, 2)):
            taken.append(key)
            yield Request([1, 2, 3], length, key=key)

    ended = []
    for result in run(engine, requests()):
        ended.append(result.request.key)
        assert len(taken) <= len(ended) + 2
    assert ended == [1, 2, 3, 0]


@pytest.mark.parametrize("model", MODELS)
def test_many_requests_are_all_answered_and_leave_nothing_behind(model: str) -> None:
    answer_many(model, 150)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_five_thousand_requests_are_all_answered_and_leave_nothing_behind(model: str) -> None:
    answer_many(model, 5000)


def answer_many(model: str, count: int) -> None:
    """Random lengths, stops, cancellations, plans and seeds, with a queue that is now full and now empty."""
    choose = random.Random(0)
    tiny: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if model.startswith("zaya"):
        tiny["layer_types"] = ["hybrid_sliding"]
    engine = Engine(random_pair(model, **tiny).layout, PLANS["all proposals"], max_batch=6, prefill_chunk=16)
    waiting = some_requests(count, seed=1)
    handles: list[Result] = []
    told: dict[Result, list[int]] = {}
    slots = []
    while waiting or not engine.idle:
        if waiting and choose.random() < 0.5:
            handles += [engine.add(waiting.pop()) for _ in range(min(choose.randint(1, 9), len(waiting)))]
        if choose.random() < 0.05:
            engine.plan = choose.choice(list(PLANS.values()))
        for result, step in engine.step():
            told.setdefault(result, []).extend(step.tokens)
        if handles and choose.random() < 0.1:
            engine.cancel(choose.choice(handles[-12:]))
        slots.append(engine._cache.num_slots)
    assert len(handles) == count == engine.counters.requests
    for handle in handles:
        assert handle.finish in ("eos", "length", "cancelled")
        assert len(handle.tokens) <= handle.request.max_new_tokens
        assert told.get(handle, []) == handle.tokens
        if handle.finish == "length":
            assert len(handle.tokens) == handle.request.max_new_tokens
    assert engine.running == engine.waiting == 0
    assert len(set(slots[len(slots) // 2 :])) == 1, "the cache no longer grows once it has seen the longest texts"
    # What an engine that has seen all this gives is what a new one gives.
    engine.plan = PLANS["all proposals"]
    again = [replace(request, seed=7) for request in some_requests(8, seed=3)]
    fresh = Engine(engine.model, engine.plan, max_batch=6)
    assert texts_of(list(run(engine, again))) == texts_of(list(run(fresh, again)))


def test_a_long_prompt_is_read_in_parts_between_the_forwards_of_the_texts_beside_it() -> None:
    pair = shared_random_pair("mixtral")
    engine = Engine(pair.layout, PLANS["all proposals"], max_batch=2, prefill_chunk=8)
    short = engine.add(Request([1, 2, 3], 20))
    engine.step()
    long = engine.add(Request(random_ids((40,), seed=1).tolist(), 4))
    while not long.tokens:
        before = len(short.tokens)
        engine.step()
        assert len(short.tokens) > before, "the short text goes on"
    while not engine.idle:
        engine.step()
    expected = [t for s in decode(pair.layout, long.request.prompt, PLANS["ar"], 4) for t in s.tokens]
    assert long.tokens == expected


@pytest.mark.parametrize(
    ("options", "message"), [({"max_batch": 0}, "max_batch is 0"), ({"prefill_chunk": 0}, "chunk")]
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(shared_random_pair("mixtral").layout, PLANS["ar"], **options)


def stock_text(pair: Pair, request: Request) -> list[int]:
    """What plain transformers answers greedily."""
    ids = torch.tensor([request.prompt])
    options: dict[str, Any] = {"do_sample": False, "suppress_tokens": [MASK], "pad_token_id": 0}
    text = pair.plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, **options
    )
    return text[0, len(request.prompt) :].tolist()


def mixed_lengths(count: int) -> list[Request]:
    return [replace(request, sampling=None, eos_token_ids=None) for request in some_requests(count, seed=2)]


@pytest.mark.parametrize("model", ["qwen3_moe", *MODELS])
def test_greedy_texts_under_load_are_those_of_transformers(model: str) -> None:
    assert_lossless_under_load(model, "some proposals", 3, 12)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", ["qwen3_moe", *MODELS])
def test_two_hundred_greedy_texts_under_load_are_those_of_transformers(model: str, plan: str, batch: int) -> None:
    assert_lossless_under_load(model, plan, batch, 200)


@cache
def stock_texts(model: str, count: int) -> dict[Any, list[int]]:
    return {request.key: stock_text(trained_pair(model), request) for request in mixed_lengths(count)}


def assert_lossless_under_load(model: str, plan: str, batch: int, count: int) -> None:
    engine = Engine(trained_pair(model).layout, PLANS[plan], max_batch=batch)
    assert texts_of(list(run(engine, mixed_lengths(count)))) == stock_texts(model, count)
    assert plan == "ar" or max(engine.counters.accepted) == BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["some proposals", "two forwards"])
def test_sampled_continuations_of_a_trained_model_are_distributed_as_those_of_plain_decoding(plan: str) -> None:
    """Two samples of 20,000 continuations each, by the engine with drafts and without: one law."""
    pair, prompt, length = trained_pair("mixtral"), [3, 5, 7], 4
    sampling = Sampling(temperature=1.5)

    def counts(name: str, first_seed: int) -> dict[tuple[int, ...], int]:
        found: dict[tuple[int, ...], int] = {}
        engine = Engine(pair.layout, replace(PLANS[name], sampling=sampling), max_batch=64)
        for result in run(engine, (Request(prompt, length + BLOCK, seed=first_seed + i) for i in range(20_000))):
            text = tuple(result.tokens[:length])
            found[text] = found.get(text, 0) + 1
        return found

    drafted, plain = counts(plan, 0), counts("ar", 10**6)
    often = [text for text in drafted.keys() | plain.keys() if drafted.get(text, 0) + plain.get(text, 0) >= 10]
    assert len(often) > 100
    table = torch.tensor([[found.get(text, 0) for text in often] for found in (drafted, plain)], dtype=torch.double)
    rest = 20_000 - table.sum(1, keepdim=True)
    table = torch.cat([table, rest], dim=1)
    expected = table.sum(0, keepdim=True) / 2
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = torch.tensor((table.shape[1] - 1) / 2, dtype=torch.double)
    assert float(torch.special.gammaincc(freedom, statistic / 2)) > 1e-3


def test_clean_columns_never_hold_the_mask_token_which_may_have_no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, own = [], Engine._forward

    def spied(engine: Engine, causal: torch.Tensor, blocks: Any) -> torch.Tensor:
        seen.append(causal)
        return own(engine, causal, blocks)

    monkeypatch.setattr(Engine, "_forward", spied)
    engine = Engine(trained_pair("mixtral").layout, PLANS["some proposals"], max_batch=4)
    list(run(engine, [Request(list(range(2 + i)), 9 + 5 * i, key=i) for i in range(4)]))
    assert any(causal.shape[0] > 1 and causal.shape[1] > 1 for causal in seen)
    assert all((causal != MASK).all() for causal in seen)
