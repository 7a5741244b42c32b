"""Calibration: the fit finds what made the times, shallow models stand for the whole, bench can be laid over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.test_parameters import tiny_model
from tests.planning.models import DEEPSEEK_V3, QWEN3_30B, ZAYA_8B, facts
from zconvert.errors import UserError
from zconvert.planning.calibrate import (
    SETS,
    Calibrated,
    Sample,
    against_bench,
    calibrate,
    fit,
    predicted_seconds,
    shallow_config,
    training_efficiency,
)
from zconvert.planning.decoding import Calibration
from zconvert.planning.machines import MACHINES
from zconvert.planning.model import facts_from_config
from zconvert.planning.workload import Workload
from zconvert.tidar.model import LayoutModel

CPU = MACHINES["cpu"].model_copy(update={"bandwidth_efficiency": 1.0, "matrix_efficiency": 1.0})
TINY = Path("examples/tiny-zaya/checkpoint")
TOKENS = sorted({size + size * len(proposals) for size, proposals in SETS})


@pytest.mark.parametrize(
    "true",
    [
        Calibration(2e-4, 1e-3, 3e-5, 1e-5, 2.0),
        Calibration(0.0, 1e-3, 0.0, 0.0, 1.5),
        Calibration(5e-4, 0.0, 1e-4, 2e-6, 0.0),
    ],
)
def test_the_fit_finds_the_coefficients_that_made_the_times(true: Calibration) -> None:
    samples = []
    for depth in (1, 2, 4):
        shape = facts("zaya", ZAYA_8B | {"num_hidden_layers": depth, "layer_types": ["hybrid"] * depth})
        for tokens in TOKENS:
            made = Calibrated(CPU, true, (), ())
            touched = 16 * (1 - (15 / 16) ** tokens)
            samples.append(Sample(shape, tokens, touched, predicted_seconds(shape, made, tokens, 4)))
    found = fit(samples, CPU, 4)
    for name in ("constant", "layer", "expert", "token", "roofline"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-3, abs=1e-9)


def test_no_coefficient_is_below_zero_whatever_the_noise() -> None:
    shape = facts("zaya", ZAYA_8B | {"num_hidden_layers": 1, "layer_types": ["hybrid"]})
    falling = [Sample(shape, tokens, 1.0, 1.0 / tokens) for tokens in TOKENS]
    found = fit(falling, CPU, 4)
    assert min(found.constant, found.layer, found.expert, found.token, found.roofline) >= 0


@pytest.mark.parametrize(("model_type", "config"), [("zaya", ZAYA_8B), ("qwen3_moe", QWEN3_30B)])
def test_a_shallow_config_has_the_widths_of_the_whole(model_type: str, config: dict[str, Any]) -> None:
    whole, shallow = facts(model_type, config), facts(model_type, shallow_config(config, 2))
    assert (shallow.layers, shallow.moe_layers) == (2, 2)
    for name in ("hidden", "experts", "expert_parameters", "queries", "keys", "vocabulary"):
        assert getattr(shallow, name) == getattr(whole, name)


def test_a_shallow_config_of_a_model_with_dense_layers_has_experts_in_all() -> None:
    shallow = facts("deepseek_v3", shallow_config(DEEPSEEK_V3, 1))
    assert (shallow.layers, shallow.moe_layers) == (1, 1)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama", "deepseek_v3", "gpt_oss"])
def test_a_family_is_measured_with_models_of_its_own(model_type: str) -> None:
    config = json.loads(tiny_model(model_type, 4, "meta").config.to_json_string(use_diff=False))
    calibrated = calibrate(config, rounds=1)
    assert {sample.tokens for sample in calibrated.samples} == {1, 4, 8, 16, 32, 64, 128, 192, 272}
    assert all(sample.seconds > 0 for sample in calibrated.samples)
    assert all(value >= 0 for value in vars(calibrated.calibration).values())
    assert predicted_seconds(facts_from_config(config, "whole"), calibrated, 16, 4) > 0


def test_training_is_timed_by_whole_steps_that_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LayoutModel(tiny_model("qwen3_moe", 4, "cpu").eval())
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    shape = facts_from_config(model.model.config.to_dict(), "tiny")
    gradients: list[Any] = []

    def one_second(step: Callable[[], None], *_: Any, **__: Any) -> float:
        kept = [value.register_hook(gradients.append) for value in model.model.parameters()]
        step()
        for each in kept:
            each.remove()
        return 1.0

    monkeypatch.setattr("zconvert.planning.calibrate._seconds", one_second)
    work = Workload(sequence_len=16, micro_batch_size=3)
    machine = CPU.model_copy(update={"fp32_tflops": 1e-3})
    reached = training_efficiency(model, shape, work, machine)
    assert reached == pytest.approx(6 * shape.active * 3 * 32 / 1e9, rel=0.5)
    assert len(gradients) == len(list(model.model.parameters()))
    assert all(value.grad is None for value in model.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert training_efficiency(model, shape, work, CPU.model_copy(update={"fp32_tflops": 1e-9})) == 1.0


def test_bench_is_laid_over_the_prediction() -> None:
    model = facts("zaya", ZAYA_8B)
    calibrated = Calibrated(CPU, Calibration(0.0, 1e-3, 0.0, 0.0, 0.0), (), ())  # 40 ms, whatever the tokens
    document = {
        "dtype": "float32",
        "results": [
            {"name": "AR", "mode": "ar", "batch_size": 1}
            | {"tokens_in_forward": 1.0, "forward_ms": 50.0, "tokens_per_forward": 1.0},
            {"name": "stock generate", "mode": "stock", "batch_size": 1},
            {"name": "lossless", "mode": "single", "batch_size": 1, "forward_cost": 0.8}
            | {"tokens_in_forward": 80.0, "forward_ms": 40.0, "tokens_per_forward": 4.0},
            {"name": "lossless", "mode": "single", "batch_size": 8},
        ],
    }
    ar, lossless = against_bench(model, calibrated, document)
    assert (ar["sampler"], ar["predicted_ms"], ar["error"]) == ("AR", pytest.approx(40), pytest.approx(-0.2))
    assert lossless["predicted_speedup"] == pytest.approx(4.0)
    assert lossless["measured_speedup"] == pytest.approx(5.0)
    assert lossless["speedup_error"] == pytest.approx(-0.2)


@pytest.mark.parametrize("document", [{}, {"results": [{"mode": "ar"}]}, {"results": 3}])
def test_another_document_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no document of `zconvert bench --json`"):
        against_bench(facts("zaya", ZAYA_8B), Calibrated(CPU, Calibration(1, 0, 0, 0, 0), (), ()), document)
