"""Forwards whose shapes stay: what compiled code and CUDA graphs need. Texts are what they are without."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.contracts.models import Pair, random_pair
from tests.contracts.test_engine import MODELS, PLANS, mixed_lengths, some_requests, texts_of
from tests.contracts.training import trained_pair
from zconvert.serving.compiled import compiled_engine
from zconvert.tidar.cache import GROWTH
from zconvert.tidar.decoding import Request
from zconvert.tidar.engine import Engine, run
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts

plans = pytest.mark.parametrize("plan", PLANS)


def grouped(pair: Pair) -> LayoutModel:
    """A model whose experts are one operation, as they are in use: a loop over them reads what was routed."""
    model = deepcopy(pair.plain)
    model.set_experts_implementation("grouped_mm")
    return LayoutModel(model)


@plans
def test_forwards_over_texts_have_few_shapes(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[Any] = set()
    model = trained_pair("zaya_sliding").layout
    own = model.decoder.forward

    def spied(**inputs: Any) -> Any:
        cache, masks = inputs["past_key_values"], inputs["attention_mask"]
        if cache.fixed is not None:
            seen.add((inputs["input_ids"].shape, *[(kind, getattr(m, "shape", None)) for kind, m in masks.items()]))
        return own(**inputs)

    monkeypatch.setattr(model.decoder, "forward", spied)
    texts = texts_of(list(run(Engine(model, PLANS[plan], max_batch=8, fixed_shapes=True), some_requests(24, seed=4))))
    kinds = {"ar": 1, "two forwards": 2, "some proposals": 2}.get(plan, 1)  # 1 stands in where none of (2, 3) fits
    assert len(seen) <= 4 * kinds, "by rows: 1, 2, 4, 8"
    assert len({shape[0] for shape, *_ in seen}) >= 2
    plain = Engine(model, PLANS[plan], max_batch=8)
    assert texts == texts_of(list(run(plain, some_requests(24, seed=4))))


def test_what_is_compiled_once_runs_whatever_texts_come_and_gives_the_same() -> None:
    # What is captured and assumed, of one layer, without the minutes that making code of it takes.
    pair = random_pair("zaya_sliding", num_hidden_layers=1, layer_types=["hybrid_sliding"])
    assert_compiled_once(pair, "some proposals", backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@plans
def test_compiled_code_runs_whatever_texts_come_and_gives_the_same(model: str, plan: str) -> None:
    assert_compiled_once(trained_pair(model), plan)


def assert_compiled_once(pair: Pair, plan: str, **options: Any) -> None:
    torch._dynamo.reset()
    model = grouped(pair)
    model.compile(**options)
    engine = compiled_engine(model, PLANS[plan], 4)
    counters.clear()
    first, *others = mixed_lengths(16)
    requests = [*others[:6], replace(first, prompt=[*range(12)] * 60), *others[6:]]
    texts = texts_of(list(run(engine, requests)))
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["graph_break"]
    assert texts == texts_of(list(run(Engine(grouped(pair), PLANS[plan], max_batch=4), requests)))


def test_a_long_text_that_ended_makes_no_others_forwards_larger() -> None:
    engine = Engine(trained_pair("mixtral").layout, PLANS["some proposals"], max_batch=4, fixed_shapes=True)
    texts = [engine.add(Request([1] * length, new)) for length, new in ((2 * GROWTH, 2), (3, 40), (4, 40), (5, 40))]
    with_it, without = set(), set()
    while not engine.idle:
        running = texts[0].finish is None
        engine.step()
        (with_it if running else without).add(engine._cache.fixed)
    assert (with_it, without) == ({3 * GROWTH}, {GROWTH})


class Waits(TorchDispatchMode):
    """Notes operations whose results' sizes are data, for which the host has to wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or name in ("nonzero", "masked_select", "unique_dim", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes what brings numbers to the host; on the CPU that passes by the dispatcher."""

    READING = ("item", "tolist", "numpy", "cpu", "equal", "__int__", "__float__", "__bool__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in self.READING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@plans
def test_a_step_waits_for_the_device_once_to_read_its_tokens(plan: str, fixed: bool, gated: bool) -> None:
    model = grouped(trained_pair("zaya_sliding"))
    if gated:
        model.add_gated(GatedParts())
    engine = Engine(model, PLANS[plan], max_batch=4, fixed_shapes=fixed)
    for request in mixed_lengths(4):
        engine.add(replace(request, max_new_tokens=40))
    engine.step()
    with Waits() as waits, Reads() as reads:
        for _ in range(3):
            engine.step()
    assert waits.found == []
    assert reads.found == ["tolist"] * 3


def test_texts_that_outgrow_their_slots_are_the_same() -> None:
    model, plan = trained_pair("mixtral").layout, PLANS["some proposals"]
    first, *others = mixed_lengths(3)
    requests = [replace(first, prompt=[*range(12)] * (GROWTH // 12 - 1), max_new_tokens=60), *others]
    texts = [texts_of(list(run(Engine(model, plan, fixed_shapes=fixed), requests))) for fixed in (False, True)]
    assert texts[0] == texts[1]
    assert len(texts[0][first.key]) == 60
