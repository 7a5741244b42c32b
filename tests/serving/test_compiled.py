"""Engines whose decoder torch has compiled: what they are ready for, and what is said where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contracts.models import random_pair
from tests.contracts.test_engine import PLANS
from zconvert.errors import UserError
from zconvert.serving.compiled import compiled_engine


def test_an_engine_is_ready_when_it_is_made_and_has_done_nothing_yet() -> None:
    model = random_pair("mixtral", num_hidden_layers=1).layout
    model.compile(backend="eager")
    engine = compiled_engine(model, PLANS["two forwards"], 3)
    assert engine.idle
    assert (engine.counters.forwards, engine.counters.prefills, engine.counters.requests) == (0, 0, 0)


def test_a_model_that_does_not_compile_here_is_told_with_the_reason() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler found")

    torch._dynamo.reset()
    model = random_pair("mixtral", num_hidden_layers=1).layout
    model.compile(backend=broken)
    with pytest.raises(UserError, match="cannot compile") as caught:
        compiled_engine(model, PLANS["all proposals"], 2)
    assert "no compiler found" in str(caught.value.found)
    assert "--compile" in caught.value.fix


def test_a_lack_of_memory_is_told_as_one() -> None:
    def lacking(graph: Any, inputs: Any) -> Any:
        def run(*_: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

        return run

    torch._dynamo.reset()
    model = random_pair("mixtral", num_hidden_layers=1).layout
    model.compile(backend=lacking)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        compiled_engine(model, PLANS["all proposals"], 2)
